"""What the suites do with scenes, machines and models that fail: the rest is still measured."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r.scene import Scene, SceneRequest
from gen3r_engine import EngineConfig
from gen3r_engine.cli import eval as eval_command
from gen3r_engine.cli import main
from gen3r_engine.engine import Engine, OutOfMemory, SceneError
from gen3r_engine.evaluation import paper_scores, record, yardstick
from gen3r_engine.evaluation.knobs import Knob
from gen3r_engine.evaluation.paper_data import Draw, read_truth
from gen3r_engine.evaluation.yardstick import Yardstick, YardstickOptions
from gen3r_training.data.samples import derive_seed
from tests.training.scenes import write_scene

FRAMES, SIZE = 5, 56
Stream = Callable[..., Iterator[Scene]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(None, EngineConfig(device="cpu"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four scenes with depth: in one a frame is damaged, in another nothing has a depth."""
    for seed, name in enumerate("abcd"):
        write_scene(tmp_path / "val" / name, FRAMES, 60, 80, seed=seed, depth=True)
    (tmp_path / "val/b/frames/00002.png").write_bytes(b"no picture")
    (tmp_path / "val/c/depth/scale.json").write_text('{"scale": 0.0}')
    return tmp_path


def perfect(root: Path) -> Stream:
    """What the engine would give if it knew the truth of each request, told by its seed."""

    def stream(requests: list[SceneRequest], **_: Any) -> Iterator[Scene]:
        drawn = Draw("co3d", root, "val", count=4, frames=FRAMES, stride=1, seed=42)
        truths = {
            derive_seed("paper noise", 42, "co3d", clip.name, "allview"): read_truth(
                clip, SIZE, True
            )
            for clip in drawn.clips
            if clip.name in "ad"
        }
        for request in requests:
            truth = truths[request.seed]
            assert truth.depth is not None
            index = torch.arange(truth.depth.numel())
            points = paper_scores.measures.unproject(
                truth.depth, truth.w2c, truth.intrinsics, index
            )
            yield Scene(
                rgb=(truth.frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8),
                depth=truth.depth,
                depth_confidence=torch.ones_like(truth.depth),
                extrinsics=truth.w2c.float(),
                intrinsics=truth.intrinsics.float(),
                points=points.reshape(*truth.depth.shape, 3),
                mask=truth.depth > 0,
            )

    return stream


def run(
    root: Path, stream: Stream, engine: Engine, monkeypatch: pytest.MonkeyPatch, scenes: int = 2
) -> int:
    monkeypatch.setattr(paper_scores, "POINTS", 100)
    monkeypatch.setattr(engine, "stream", stream)
    monkeypatch.setattr(eval_command, "_load", lambda _: engine)
    wanted = ["--data", f"co3d={root}", "--rows", str(root / "rows.jsonl"), "--tasks", "allview"]
    sizes = ["--frames", str(FRAMES), "--size", str(SIZE), "--scenes", str(scenes)]
    return main(["eval", "--suite", "paper", *wanted, *sizes, "--lpips-net", "alex"])


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]


def test_scenes_that_cannot_be_read_give_their_place(
    root: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):  # the same command again finds all rows and makes nothing
        assert run(root, perfect(root), engine, monkeypatch) == 0
        assert sorted(row["scene"] for row in rows(root)) == ["a", "d"]
        assert all(row["figures"]["auc30"] == 1.0 for row in rows(root))
    assert run(root, perfect(root), engine, monkeypatch, scenes=4) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 scene(s) left out" in text and "b: 00002.png cannot be read" in text
    assert "c: fewer than 3 pixels of the clip have a depth" in text
    drawn = Draw("co3d", root, "val", count=1, frames=FRAMES, stride=1, seed=0)
    for _ in range(3):
        assert drawn.leave_out(drawn.clips[0], "damaged") in drawn.clips
    with pytest.raises(ValueError, match="none of 4 scenes fits"):
        drawn.leave_out(drawn.clips[0], "damaged")


def test_results_that_are_not_finite_become_rows(
    root: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(requests: list[SceneRequest], **_: Any) -> Iterator[Scene]:
        for scene in perfect(root)(requests):
            lost = {"extrinsics": scene.extrinsics * math.nan, "points": scene.points * math.nan}
            yield dataclasses.replace(scene, **lost)

    assert run(root, broken, engine, monkeypatch) == 0
    assert [row["figures"] for row in rows(root)] == [{"auc30": 0.0}] * 2
    assert "2 row(s) have cameras that are not finite" in capsys.readouterr().out


def test_failures_name_the_scene_in_one_line(
    root: Path,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(error: Exception) -> Stream:
        def stream(requests: list[SceneRequest], **_: Any) -> Iterator[Scene]:
            yield from perfect(root)(requests[:1])
            raise error

        return stream

    for error, words in (
        (SceneError((1,), "decode", RuntimeError("a bad day")), "RuntimeError: a bad day"),
        (torch.cuda.OutOfMemoryError("tried to allocate"), "does not hold this: use a smaller"),
        (OutOfMemory("decode", 3.0, "use 12gb"), "about 3.0 GiB needed"),
    ):
        (root / "rows.jsonl").unlink(missing_ok=True)
        assert run(root, failing(error), engine, monkeypatch) == 1
        (first,) = rows(root)  # is not made again
        (text,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert words in text and "co3d allview, scene " in text
        if isinstance(error, SceneError):
            assert text.endswith(f"scene {'d' if first['scene'] == 'a' else 'a'}")

    def small(requests: list[SceneRequest], **_: Any) -> Iterator[Scene]:
        for scene in perfect(root)(requests):
            yield dataclasses.replace(scene, points=scene.points[:, 1:])

    (root / "rows.jsonl").unlink()
    assert run(root, small, engine, monkeypatch) == 2
    text = capsys.readouterr().err
    assert "for true depth of" in text and "co3d allview, scene " in text


def test_a_record_without_git_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such program")

    monkeypatch.setattr(subprocess, "run", nothing)
    monkeypatch.setattr(record, "device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = record.environment(torch.device("cuda"))
    assert (found["driver"], found["commit"], found["capability"]) == (None, "unknown", "9.0")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(preset="fp8"), "preset fp8 cannot be the reference.*knob 'fp8'"),
        (EngineConfig(attention="triton_int8"), "knob 'attention triton_int8'"),
        (EngineConfig(encoder_precision="float32"), "knob 'encoder float32'"),
    ],
)
def test_the_reference_is_exact(config: EngineConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        YardstickOptions(None, config)
    YardstickOptions(None, EngineConfig(attention="sdpa", dtype="float32"))


def test_a_knob_whose_error_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_engine(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(yardstick, "load_engine", load_engine)
    options = YardstickOptions(None, EngineConfig(device="cpu"))
    row = yardstick._Run(options, lambda *_: None).attempt(Knob("x"), Yardstick(options))
    assert row.problem == "RuntimeError"
