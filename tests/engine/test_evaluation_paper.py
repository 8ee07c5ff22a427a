"""Suite `paper`: data, figures and the whole run on synthetic scenes with the embedded model."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from gen3r.scene import Scene
from gen3r_engine import EngineConfig
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation import images, measures, paper, paper_scores
from gen3r_engine.evaluation.paper_data import (
    DATA_SETS,
    ClipPlace,
    Draw,
    Truth,
    parse_roots,
    read_depth,
    read_truth,
)
from gen3r_engine.evaluation.paper_options import add_paper_arguments
from gen3r_engine.evaluation.paper_published import PUBLISHED
from gen3r_engine.evaluation.paper_report import Rows, mean_and_error
from gen3r_engine.evaluation.paper_scores import FIGURES, figures_of
from gen3r_engine.evaluation.record import weights_digest
from gen3r_training.data.layout import read_scene
from tests.training.scenes import write_scene

FRAMES, SIZE = 5, 56


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation scenes of 7 frames with depth, and one too short for a clip."""
    folder = tmp_path_factory.mktemp("rooms")
    for name, frames, seed in (("a", 7, 0), ("b", 7, 1), ("short", 3, 2)):
        write_scene(folder / "val" / name, frames, 60, 80, seed=seed, depth=True)
    return folder


def clip_of(root: Path, name: str = "a") -> ClipPlace:
    return ClipPlace("co3d", read_scene(root / "val" / name), tuple(range(FRAMES)))


def true_scene(truth: Truth) -> Scene:
    """A scene that is the truth in another world frame and scale: what a perfect model gives."""
    assert truth.depth is not None
    index = torch.arange(truth.depth.numel())
    exact = measures.unproject(truth.depth, truth.w2c, truth.intrinsics, index).numpy()
    world = np.eye(4)
    world[:3, :3] = Rotation.from_rotvec([0.4, 1.0, -0.2]).as_matrix()
    points = torch.from_numpy(0.3 * exact @ world[:3, :3].T + [1.0, 2.0, 3.0])
    w2c = truth.w2c @ torch.from_numpy(np.linalg.inv(world))
    return Scene(
        rgb=(truth.frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8),
        depth=truth.depth,
        depth_confidence=torch.ones_like(truth.depth),
        extrinsics=w2c.float(),
        intrinsics=truth.intrinsics.float(),
        points=points.reshape(*truth.depth.shape, 3),
        mask=truth.depth > 0,
    )


# ------------------------------------------------------------------------------------- published


def test_published_figures_are_of_what_is_measured() -> None:
    for dataset, task, figure in PUBLISHED:
        assert figure in figures_of(task, DATA_SETS[dataset].geometry)
    assert PUBLISHED["realestate10k", "1view", "psnr"] == (20.51, "table 1")
    assert ("dl3dv", "1view", "rre") not in PUBLISHED


def test_the_papers_chamfer_is_the_mean_of_the_two() -> None:
    for (dataset, task, figure), (value, _) in PUBLISHED.items():
        if figure == "chamfer":
            both = [PUBLISHED[dataset, task, name][0] for name in ("accuracy", "completeness")]
            assert value == pytest.approx(sum(both) / 2, abs=1.1e-4)


# ------------------------------------------------------------------------------------------ data


def test_data_roots_by_name(tmp_path: Path) -> None:
    assert parse_roots([f"re10k={tmp_path}", f"Co3D={tmp_path}"]) == {
        "realestate10k": tmp_path,
        "co3d": tmp_path,
    }
    for texts, words in (
        (["scannet=x"], "names: realestate10k, dl3dv, co3d, wildrgbd, tartanair"),
        ([str(tmp_path)], "NAME=DIR"),
        ([f"co3d={tmp_path}", f"co3dv2={tmp_path}"], "co3d twice"),
        ([f"co3d={tmp_path}/none"], "no folder"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_roots(texts)


def test_clips_are_a_function_of_the_seed(root: Path) -> None:
    def chosen(**changes: Any) -> list[tuple[str, tuple[int, ...]]]:
        given = {"count": 9, "frames": FRAMES, "stride": 1, "seed": 0} | changes
        drawn = Draw("co3d", root, "val", **given)
        assert list(drawn.left_out) == (["short"] if len(drawn.clips) == 2 else [])
        return [(clip.name, clip.rows) for clip in drawn.clips]

    assert {name for name, _ in chosen()} == {"a", "b"}
    assert chosen() == chosen()
    assert len({tuple(chosen(seed=seed)) for seed in range(9)}) > 2
    assert chosen(frames=3, stride=3)[0][1] == (0, 3, 6)
    with pytest.raises(ValueError, match="none of 3 scenes fits"):
        chosen(frames=9)


def test_depth_is_cut_as_the_frames_are(root: Path, tmp_path: Path) -> None:
    clip = clip_of(root)
    truth = read_truth(clip, 56, with_depth=True)
    assert truth.depth is not None
    assert truth.frames.shape == (FRAMES, 3, 56, 56)
    # The frames' own grey in the place of the depth comes out as the frames' grey.
    folder = write_scene(tmp_path / "s", 1, 60, 80, depth=True)
    with Image.open(folder / "frames/00000.png") as image:
        grey = np.asarray(image.convert("L"))
    Image.fromarray(grey.astype(np.uint16)).save(folder / "depth/00000.png")
    (folder / "depth/scale.json").write_text('{"scale": 0.5}')
    scene = read_scene(folder)
    found = read_depth(scene, [0], 60)[0]
    assert torch.equal(found, torch.from_numpy(grey[:, 10:70].astype(np.float32)) / 2)
    Image.fromarray(np.ones((5, 5), np.uint16)).save(folder / "depth/00000.png")
    with pytest.raises(ValueError, match="pixels for a frame of"):
        read_depth(scene, [0], 60)


# --------------------------------------------------------------------------------------- figures


def test_a_perfect_scene_has_perfect_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_scores, "POINTS", 500)
    truth = read_truth(clip_of(root), 56, with_depth=True)
    found = paper_scores.score(true_scene(truth), truth, figures_of("2view", True), lpips_net=None)
    assert set(found) == set(FIGURES) - {"lpips"}
    assert found["psnr"] > 50  # 8 bits
    assert found["ssim"] > 0.999
    predicted, true = paper_scores.corresponding(true_scene(truth).points, truth, seed=0)
    moved = paper_scores.geometry.transform(
        predicted, *paper_scores.geometry.umeyama(predicted, true)
    )
    np.testing.assert_allclose(moved, true, atol=1e-9)
    # Pixels are a grid: of points that are equally far, rounding may take another one.
    assert found["chamfer"] < 0.01
    assert found["auc30"] == 1.0
    assert found["rre"] < 1e-3


def test_a_wrong_scene_has_wrong_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat points at another place and a camera that stands still."""
    monkeypatch.setattr(paper_scores, "POINTS", 500)
    truth = read_truth(clip_of(root), 56, with_depth=True)
    scene = true_scene(truth)
    points = scene.points.clone()
    points[..., 2] = 0
    wrong = Scene(
        255 - scene.rgb,
        *(scene.depth, scene.depth_confidence),
        torch.eye(4).expand(FRAMES, 4, 4),
        scene.intrinsics,
        points,
        scene.mask,
    )
    found = paper_scores.score(wrong, truth, figures_of("1view", True), lpips_net=None)
    assert found["psnr"] < 15
    assert found["chamfer"] > 0.1
    assert found["auc30"] < 0.5
    assert found["chamfer"] == pytest.approx((found["accuracy"] + found["completeness"]) / 2)


def test_true_points_lie_on_the_rooms_walls(root: Path) -> None:
    """All frames' true points are those of one room: neighbours of the first frame's."""
    truth = read_truth(clip_of(root), 60, with_depth=True)
    assert truth.depth is not None
    index = torch.arange(truth.depth.numel())
    points = measures.unproject(truth.depth, truth.w2c, truth.intrinsics, index)
    first, last = points[: 60 * 60], points[-60 * 60 :]
    accuracy, _, _ = paper_scores.geometry.accuracy_completeness(last, first)
    assert accuracy < 0.03 * float(truth.depth.mean())


# ------------------------------------------------------------------------------------- rows, run


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = Rows(file, {"seed": 1, "roots": ("a",)})
    rows.add({"scene": "a"}, {"psnr": 20.0})
    with file.open("a") as out:
        out.write('{"scene": "b", "figu')
    again = Rows(file, {"seed": 1, "roots": ["a"]})
    assert (len(again.kept), again.damaged) == (1, 1)
    assert again.has({"scene": "a"})
    again.add({"scene": "b"}, {"psnr": 10.0})
    assert [row["scene"] for row in Rows(file, {"seed": 1, "roots": ["a"]}).kept] == ["a", "b"]
    assert Rows(file, {"seed": 2, "roots": ["a"]}).kept == []
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])


def arguments(*flags: str) -> argparse.Namespace:
    """As the command line makes them: this suite's flags and the common ones."""
    parser = argparse.ArgumentParser()
    add_paper_arguments(parser)
    for name in ("scenes", "frames", "size", "steps", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.set_defaults(guidance=None, solver=None, pretrained_model_name_or_path=None)
    return parser.parse_args(flags)


def test_the_whole_suite(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_scores, "POINTS", 200)
    monkeypatch.setattr(images, "lpips_problem", lambda net: "no weights here")
    file = tmp_path / "results" / "paper.jsonl"  # the folder is made
    flags = ["--data", f"re10k={root}", f"co3d={root}", "--rows", str(file), "--steps", "2"]
    flags += ["--scenes", "1", "--frames", str(FRAMES), "--size", str(SIZE)]
    engine = Engine.load(None, EngineConfig(device="cpu"))
    asked: list[Any] = []
    stream = engine.stream

    def watched(requests: list[Any], **settings: Any) -> Any:
        asked.extend(requests)
        return stream(requests, **settings)

    monkeypatch.setattr(engine, "stream", watched)
    assert paper.run_paper(arguments(*flags, "--tasks", "2view"), lambda: engine) == 0
    # The same again, with one more task on one of the sets: only that is made.
    flags.remove(f"re10k={root}")
    assert paper.run_paper(arguments(*flags, "--tasks", "allview", "2view"), lambda: engine) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["dataset"], row["task"]) for row in rows] == [
        *(("realestate10k", "2view"), ("co3d", "2view"), ("co3d", "allview"))
    ]
    for row in rows:
        geometry = row["dataset"] == "co3d"
        assert set(row["figures"]) == set(figures_of(row["task"], geometry)) - {"lpips"}
        assert all(math.isfinite(value) for value in row["figures"].values())
    given = [(len(request.images), request.cameras == "free") for request in asked]
    assert given == [(2, False), (2, False), (FRAMES, True)]
    first, second = capsys.readouterr().out.split("the paper's protocol")[1:]
    for text in ("27.05", "table 1", "table 2", "not measured", "not found", "no weights here"):
        assert text in first
    assert "0.9625" in second
    assert "27.05" not in second
    # Other settings, other weights among them, are other rows.
    assert len(Rows(file, rows[0]["settings"]).kept) == 3
    with torch.no_grad():
        next(engine.pipeline.transformer.parameters()).mul_(2)
    changed = rows[0]["settings"] | {"weights": weights_digest(engine.pipeline)}
    assert len(Rows(file, changed).kept) == 0


def test_flags_that_do_not_fit(root: Path) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(ValueError) as error:
            paper.run_paper(arguments(*flags), lambda: pytest.fail("a model was loaded"))
        return str(error.value)

    data = ["--data", f"co3d={root}"]
    assert "needs --data NAME=DIR" in refused()
    assert f"--data co3d={root} has no folder 'train'" in refused(*data, "--split", "train")
    assert "LPIPS net 'resnet' is unknown; known: alex" in refused(*data, "--lpips-net", "resnet")
