"""`gen3r-engine eval` and `verify --yardstick` on the embedded model, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.harness import KEYS, read_rows
from benchmarks.report import markdown as benchmark_tables
from gen3r.run import draw_noise
from gen3r_engine import EngineConfig
from gen3r_engine.cli import main
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation import preset_quality, text_colors
from gen3r_engine.evaluation.held_out import held_out, requests
from gen3r_engine.evaluation.knobs import Knob, all_knobs, choose, load_engine
from gen3r_engine.evaluation.nano import PARTS
from gen3r_engine.evaluation.sampling import Sampler
from gen3r_engine.fidelity import Curve
from gen3r_engine.verify import LIMITS, Verification
from gen3r_training.procedural import Clips

SMALL = ["--frames", "5", "--size", "56", "--device", "cpu", "--steps", "1"]
CPU = EngineConfig(device="cpu", max_batch=2, compiled=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(None, CPU)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return held_out([0, 1], seed=3, frames=5, size=56, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("task", "cameras"),
    [("1view", "true"), ("2view", "arc_left"), ("allview", "true")],
)
def test_batches_equal_the_engines_own_scenes(
    task: str, cameras: str, engine: Engine, clips: Clips
) -> None:
    asked = requests(clips, task, cameras, noise=7)
    sampler = Sampler(engine, batch=2, steps=1)
    found = sampler.generate(asked)
    noise, draws = sampler.draw(asked[1:])
    (scene,) = engine.generate(asked[1:], steps=1, latents=noise, posterior_noise=draws)
    # Batched products round differently: one level of 255, and the last bits of float32.
    assert (found.video[1].int() - scene.rgb.int()).abs().max() <= 1
    torch.testing.assert_close(found.depths[1], scene.depth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.poses[1], scene.extrinsics, rtol=1e-4, atol=1e-4)


def test_noise_is_one_draw_for_every_dtype(engine: Engine, clips: Clips) -> None:
    asked = requests(clips, "1view", noise=7)
    own = draw_noise(asked, None, None, None, 16, torch.device("cpu"), torch.bfloat16)
    assert engine.pipeline.dtype == torch.float32
    for found, wanted in zip(Sampler(engine).draw(asked), own, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted.float())


def test_what_a_sampler_refuses(engine: Engine, clips: Clips) -> None:
    with pytest.raises(ValueError, match="batch 0 is below 1"):
        Sampler(engine, batch=0)
    sampler = Sampler(engine, steps=1)
    mixed = [requests(clips, "1view")[0], requests(clips, "2view")[1]]
    with pytest.raises(ValueError, match="must agree in task"):
        sampler.generate(mixed)
    small = held_out([0], seed=3, frames=5, size=28, device=torch.device("cpu"))
    (wrong,) = requests(clips.take([0]), "1view")
    object.__setattr__(wrong, "images", [small.rgb[0, 0]])
    with pytest.raises(ValueError, match="views must be uint8 tensors"):
        sampler.generate([wrong])
    found = sampler.generate(requests(clips.take([0]), "1view"), frozenset({"cameras"}))
    with pytest.raises(ValueError, match="depth was not decoded"):
        _ = found.depths


def test_the_nano_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = text_colors.find_cases(1, seed=3, size=56, device="cpu")
    monkeypatch.setattr(text_colors, "find_cases", lambda *_, **__: case)
    monkeypatch.setattr("gen3r_engine.evaluation.held_out.BASELINE", 2)
    file, sheet = tmp_path / "new" / "nano.json", tmp_path / "sheet.png"
    wanted = ["--scenes", "1", "--seed", "3", "--json", str(file), "--sheet", str(sheet)]
    assert main(["eval", "--suite", "nano", *SMALL, *wanted]) == 0
    text = capsys.readouterr().out
    assert "first frame" in text and "identity" in text and "mean depth" in text
    found = json.loads(file.read_text())
    assert {figure["part"] for figure in found["figures"]} == set(PARTS)
    bars = {f"{f['part']} {f['name']}": f["bar"] for f in found["figures"] if f["bar"] is not None}
    assert bars == {
        "vae PSNR": 27.0,
        "adapter depth AbsRel, increase over VGGT's": 0.03,
        "allview depth AbsRel": 0.1,
        "allview pose AUC@30": 0.7,
        "2view PSNR gain over the first frame": 2.0,
        "1view pose AUC@30 against the asked path": 0.6,
        "moves named as asked": 0.8,
        "text p-value of it": 0.05,
    }
    assert sum(map(sum, found["moves"]["confusion"])) == 6 and len(found["text"]) == 1
    assert found["settings"]["steps"] == 1 and found["environment"]["versions"]["torch"]
    assert found["model"]["checkpoint"] == "embedded" and len(found["model"]["weights"]) == 16
    (move,) = found["clip_moves"]
    figures = {f"{f['part']} {f['name']}": f for f in found["figures"]}
    kind = "random paths" if move == "random" else "built-in moves"
    assert (
        figures["allview pose AUC@30"]["baselines"]
        == (figures[f"allview pose AUC@30, {kind}"]["baselines"])
    )
    assert Image.open(sheet).size[1] > 5 * 56


def test_the_yardstick(tmp_path: Path) -> None:
    rows, table = tmp_path / "quality.jsonl", tmp_path / "quality.md"
    knobs = ["--knobs", "fp8", "float32", "guidance [12]", "--without", "guidance 2"]
    files = ["--json", str(rows), "--markdown", str(table), "--commit", "abc"]
    assert main(["eval", "--suite", "yardstick", *SMALL, "--scenes", "1", *knobs, *files]) == 0
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[1:]] == [
        *("exact", "fp8", "guidance 1")  # float32 is the reference's own
    ]
    assert "not here: needs a GPU" in lines[2]
    found = read_rows([rows])
    assert {row["suite"] for row in found} == {"quality"} and set(found[0]) == set(KEYS)
    timed = {row["provider"] for row in found if row["metric"] == "time"}
    assert timed == {"exact", "guidance 1"}
    settings = found[0]["config"]["settings"]
    assert (settings["preset"], settings["attention"]) == ("exact", "auto")
    assert settings["encoder_precision"] == "model"
    assert found[0]["config"]["checkpoint"] == "embedded" and found[0]["config"]["weights"]
    assert found[0]["commit"] == "abc" and "quality" in benchmark_tables(found)


def test_every_knob_is_listed_once() -> None:
    knobs = all_knobs(CPU)
    names = [knob.name for knob in knobs]
    assert len(set(names)) == len(names)
    assert {"fp8", "bfloat16", "24gb", "12gb", "compiled", "attention triton_int8"} <= set(names)
    assert [k.name for k in choose(knobs, ["dpm++ *"])] == [f"dpm++ {n}" for n in (50, 30, 20, 10)]
    with pytest.raises(ValueError, match="knob 'turbo' is unknown; known: another seed, fp8"):
        choose(knobs, ["turbo"])


def test_a_knob_may_take_plain_operators() -> None:
    knob = Knob("fp8, plain operators", config={"preset": "fp8"}, reference=True)
    engine = load_engine(None, CPU, knob)
    assert engine.pipeline.transformer.backends.operators == "reference"
    assert engine.pipeline.transformer.typed_blocks[0].self_attn.int8_scores


def test_verify_prints_the_yardstick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Verification(
        *("exact", "float32", "float32", 1, Curve((0.0,), (1.0,))),
        *(math.inf, 0.0, 0.0, None, LIMITS["float32"]),
    )
    monkeypatch.setattr("gen3r_engine.verify.verify", lambda *_, **__: same)
    file = tmp_path / "verify.json"
    wanted = ["--yardstick", "--scenes", "1", "--json", str(file)]
    assert main(["verify", *SMALL, *wanted]) == 0
    text = capsys.readouterr().out
    assert "verdict: preset exact holds" in text and "| another seed |" in text
    found = json.loads(file.read_text())["yardstick"]
    assert [row["name"] for row in found["rows"]] == ["exact", "another seed"]
    assert found["settings"]["tasks"] == ["1view", "allview"] and found["settings"]["batch"] == 1


def test_a_config_has_a_row_where_it_is_not_the_exact_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[EngineConfig, list[Knob]]] = []
    monkeypatch.setattr(
        preset_quality, "run_yardstick", lambda o, k, *_: asked.append((o.config, k))
    )
    chosen = EngineConfig(preset="fp8", dtype="bfloat16", residency="24gb", device="cpu")
    preset_quality.held_out_quality(None, chosen, scenes=1)
    ((reference, knobs),) = asked
    assert reference == EngineConfig(residency="24gb", device="cpu")
    assert [knob.name for knob in knobs] == ["another seed", "fp8 bfloat16"]
    assert knobs[1].config == {"preset": "fp8", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--suite", "nano", "--scenes", "0"], "--scenes 0 is below 1"),
        (["eval", "--suite", "nano", "--parts", "vae,video"], "part 'video' is unknown"),
        (["eval", "--suite", "nano", "--knobs", "fp8"], "--knobs belongs to --suite yardstick"),
        (["eval", "--suite", "nano", "--data", "co3d=x"], "--data belongs to --suite paper"),
        (["eval", "--suite", "nano", "--guidance", "-1"], "--guidance -1.0 is out of range"),
        (["eval", "--suite", "yardstick", "--knobs", "turbo"], "knob 'turbo' is unknown"),
        (["eval", "--suite", "yardstick", "--json", "/dev/null/x"], "can not be written"),
        (["eval", "--suite", "yardstick", "--preset", "fp8"], "preset fp8 cannot be the reference"),
        (["eval", "--suite", "nano", "--stride", "2"], "--stride belongs to --suite paper"),
        (["eval", "--suite", "nano", "--rows", "x"], "--rows belongs to --suite paper"),
        (["eval", "--suite", "nano", "--lpips-net", "vgg"], "--lpips-net belongs to"),
        (["eval", "--suite", "nano", "--frames", "16"], "--frames 16: a clip has 4k + 1"),
        (["eval", "--suite", "yardstick", "--frames", "1"], "5 or more; use 5"),
        (["eval", "--suite", "paper", "--size", "100"], "--size 100 is not a multiple of 56"),
        (["eval", "--suite", "nano", "--json", "/"], "--json / is a folder; give a file"),
        (["eval", "--suite", "nano", "--sheet", "x.mov"], "'.mov' is no kind of picture; use .png"),
        (["eval", "--suite", "paper", "--rows", "/"], "--rows / is a folder"),
        (["eval", "--suite", "paper", "--stride", "0"], "--stride 0 is below 1"),
        (["eval", "--suite", "paper"], "--suite paper needs --data"),
        (["verify", "--size", "abc"], "--size: size 'abc' is not a size"),
        (["verify", "--yardstick", "--frames", "1"], "--frames 1: a clip has 4k + 1 frames"),
        (["verify", "--json", "/"], "--json / is a folder"),
        (["verify", "--scenes", "2"], "--scenes belongs to --yardstick"),
        (["verify", "--yardstick", "--size", "56x112"], "held-out scenes are square"),
    ],
)
def test_wrong_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err
