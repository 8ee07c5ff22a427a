"""The engine behind `gen3r-engine run` and `warmup`: flags, records, memory, batches, faults."""

from __future__ import annotations

import json
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r_engine import Engine
from gen3r_engine.cli import main
from gen3r_engine.denoiser import Denoiser
from gen3r_engine.memory import OutOfMemory
from tests.conftest import REPOSITORY
from tests.engine.commands import SMALL, process, run
from tests.engine.scenes import MadeEngine

PHOTO = str(REPOSITORY / "examples" / "1view" / "photo.jpg")
QUICK = ["--frame_path", PHOTO, "--steps", "2"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*/*/run.json"))]


def scenes_file(here: Path, count: int) -> str:
    lines = [json.dumps({"frame_path": PHOTO, "seed": seed}) for seed in range(count)]
    (here / "scenes.jsonl").write_text("\n".join(lines))
    return "scenes.jsonl"


# ------------------------------------------------------------------------------------------- flags


def test_engine_flags_reach_the_engine(here: Path, engine: MadeEngine) -> None:
    flags = "--preset exact --residency 24gb --max-memory 20.5 --no-compile --no-overlap"
    flags += " --retry-on-oom --cache-dir kept --prompt-cache disk --batch 3 --device cpu"
    assert run("--frame_path", "a.png", *flags.split()) == 0
    config = engine.config
    assert (config.preset, config.residency, config.max_memory_gib) == ("exact", "24gb", 20.5)
    assert (config.compiled, config.overlap, config.retry_on_oom) == (False, False, True)
    assert (config.cache_dir, config.prompt_cache) == (Path("kept"), "disk")
    assert (config.max_batch, config.device) == (3, "cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset turbo", "invalid choice: 'turbo'"),
        ("--residency 8gb", "invalid choice: '8gb'"),
        ("--max-memory 0", "--max-memory 0.0 is out of range"),
        ("--batch 0", "--batch 0 is below 1"),
        ("--prompt-cache tape", "invalid choice: 'tape'"),
    ],
)
def test_bad_engine_flags(
    here: Path,
    engine: MadeEngine,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    assert run("--frame_path", "a.png", *flags.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and message in shown.err
    assert not engine.calls and not (here / "outputs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_fp8_without_a_gpu_says_what_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--frame_path", "a.png", "--preset", "fp8") == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "use preset 'exact'" in shown


# ------------------------------------------------------------------------------------------ record


def test_run_json_records_the_engine(here: Path) -> None:
    assert run(*QUICK, "--batch", "2", "--prompt-cache", "off") == 0
    (saved,) = records(here / "outputs")
    config = saved["config"]["engine"]
    assert config["config"]["max_batch"] == 2 and config["config"]["prompt_cache"] == "off"
    assert config["resolved"]["residency"] == "resident"
    assert saved["config"]["dtype"] == "float32" and saved["config"]["device"] == "cpu"
    assert saved["scene"]["compile_cache"] == "none" and saved["scene"]["preset"] == "exact"
    assert {"encode text", "denoise", "decode geometry", "write cameras"} <= set(saved["seconds"])
    assert saved["scene"]["peak_memory_gib"] > 0


def test_many_scenes_in_batches(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--requests", scenes_file(here, 3), "--steps", "2", "--batch", "2") == 0
    saved = records(here / "outputs")
    assert sorted((r["seed"], r["config"]["batch"]) for r in saved) == [(0, 2), (1, 2), (2, 1)]
    shown = capsys.readouterr()
    assert shown.out.count("scene:   ") == 3 and "3 scenes in" in shown.out
    assert "denoise [1/3] (2 steps)" in shown.err and "write cameras [3/3]" in shown.err


def test_scenes_are_written_while_others_are_made(here: Path, engine: MadeEngine) -> None:
    engine.raises, engine.fails_at = RuntimeError("broken"), 2
    with pytest.raises(RuntimeError, match="broken"):
        run("--requests", scenes_file(here, 4))
    assert [r["seed"] for r in records(here / "outputs")] == [0, 1]


# ------------------------------------------------------------------------------------------ memory


def test_out_of_memory_is_one_line_and_exit_code_1(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.raises = OutOfMemory("denoise", 25.25, "use residency '24gb'")
    assert run("--frame_path", "a.png") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of GPU memory in stage 'denoise' (about 25.2 GiB needed)")
    assert error.endswith("use residency '24gb'")
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_out_of_memory_in_the_loop(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: bool,
) -> None:
    original = Denoiser.run

    def full(self: Denoiser, conditions: Any, noise: Any, *arguments: Any) -> Any:
        if len(noise) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, conditions, noise, *arguments)

    monkeypatch.setattr(Denoiser, "run", full)
    flags = ["--requests", scenes_file(here, 2), "--steps", "2", "--batch", "2"]
    assert run(*flags, *(["--retry-on-oom"] if asked else [])) == (0 if asked else 1)
    if asked:
        assert [r["config"]["batch"] for r in records(here / "outputs")] == [1, 1]
        return
    error = capsys.readouterr().err.splitlines()[-1]
    for words in ("stage 'denoise'", "GiB needed", "a batch of 1", "residency '24gb'"):
        assert words in error
    assert not (here / "outputs").exists()


# ------------------------------------------------------------------------------------------ warmup


def test_warmup(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--frames", "5", "--size", "56x112", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "5 frames of 56 x 112, 2 at once" in out
    if not torch.cuda.is_available():
        assert "nothing is compiled here" in out
    assert main(["warmup", "--frames", "6"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("use 5 or 9")


def test_warmup_names_the_cache(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Engine.load

    def load(*arguments: Any) -> Engine:
        found = original(*arguments)
        found.warmth.enabled = True
        return found

    monkeypatch.setattr(Engine, "load", load)
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        (here / variable).mkdir()
        (here / variable / "code").write_text("compiled")
        monkeypatch.setenv(variable, str(here / variable))
    flags = ["--frames", "5", "--size", "56", "--cache-dir", "kept"]
    for state in ("cold", "warm"):
        assert main(["warmup", *flags]) == 0
        assert f"cache:   kept (was {state})" in capsys.readouterr().out
    assert len(list((here / "kept" / "warm").iterdir())) == 1
    assert run(*QUICK, "--cache-dir", "kept") == 0
    (saved,) = records(here / "outputs")
    assert saved["scene"]["compile_cache"] == "warm"


# --------------------------------------------------------------------------------------- processes


def test_two_processes_share_the_prompt_cache(here: Path) -> None:
    flags = [*SMALL, *QUICK, "--prompts", "a red room", "--prompt-cache", "disk"]
    flags += ["--cache-dir", str(here / "kept"), "--output_dir", "out"]

    def one(_: int) -> Any:
        return process("run", *flags, cwd=here, capture_output=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(one, range(2)):
            assert done.returncode == 0, done.stderr
    kept = sorted(p.name for p in (here / "kept" / "prompts").rglob("*") if p.is_file())
    assert len(kept) == 2 and all(name.endswith(".safetensors") for name in kept)
    assert len(records(here / "out")) == 2


@pytest.mark.slow
def test_killed_in_the_loop_leaves_no_half_scene_and_a_usable_cache(here: Path) -> None:
    kept = ["--prompt-cache", "disk", "--cache-dir", str(here / "kept")]
    flags = [*SMALL, "--frame_path", PHOTO, "--prompts", "a red room", *kept]
    started = process(
        *("run", *flags, "--steps", "100000"),
        cwd=here,
        starter=subprocess.Popen,
        stderr=subprocess.PIPE,
    )
    for line in started.stderr:
        if line.startswith("encode views"):  # denoising comes next
            started.send_signal(signal.SIGKILL)
            break
    started.stderr.read()
    assert started.wait(timeout=60) == -signal.SIGKILL
    assert not (here / "outputs").exists()
    before = sorted(p.name for p in (here / "kept").rglob("*.safetensors"))
    assert len(before) == 2
    assert run(*QUICK, "--prompts", "a red room", *kept) == 0
    assert sorted(p.name for p in (here / "kept").rglob("*.safetensors")) == before
    assert len(records(here / "outputs")) == 1


@pytest.mark.slow
def test_interrupted_between_scenes_keeps_whole_scenes_only(here: Path) -> None:
    flags = ["--requests", scenes_file(here, 60), "--frames", "5", "--size", "56", "--steps", "2"]
    started = process("run", *flags, cwd=here, starter=subprocess.Popen, stderr=subprocess.PIPE)
    for line in started.stderr:
        if line.startswith("write rgb [2/60]"):
            started.send_signal(signal.SIGINT)
            break
    rest = started.stderr.read()
    assert started.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest and rest.endswith("no unfinished result was left behind\n")
    folders = list((here / "outputs" / "1view").iterdir())
    assert folders and not [f for f in folders if f.name.startswith(".")]
    assert all((f / "run.json").is_file() for f in folders)
