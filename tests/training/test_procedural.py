"""Procedural clips: a pure function of their numbers, exact geometry, exact moves, free paths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gen3r.cameras import trajectory
from gen3r.scene import TRAJECTORIES
from gen3r.vggt.bootstrap import scene_scale
from gen3r_training.procedural import COLORS, NO_OBJECT, Clips, caption_corpus, make_clips
from gen3r_training.procedural import paths as p
from gen3r_training.procedural import table as t
from gen3r_training.procedural.layout import Layout
from gen3r_training.procedural.make import _measure, _paths, _scene_tensors
from gen3r_training.procedural.objects import sample_layout
from gen3r_training.procedural.paths import CLEARANCE, clearance, world_poses
from gen3r_training.procedural.trace import first_hits

SEED = 5
HALF = 2**-11  # relative step of float16


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(range(6), seed=SEED, split="held_out", frames=3, size=56, supersample=1)


def unit_points(clips: Clips) -> tuple[Tensor, Tensor]:
    """Distance of the first view's points [N, H, W] and whether there are any."""
    depth = clips.depth[:, 0].double()
    grid = torch.arange(depth.shape[-1]) + 0.5 - depth.shape[-1] / 2
    focal = clips.intrinsics[:, 0, 0].double()[:, None, None]
    slope = (grid[None, None, :] / focal).square() + (grid[None, :, None] / focal).square()
    return depth * (1 + slope).sqrt(), depth > 0


def test_a_clip_does_not_depend_on_its_batch(clips: Clips) -> None:
    again = make_clips([4, 1], seed=SEED, split="held_out", frames=3, size=56, supersample=1)
    chosen = clips.take([4, 1])
    for name, value in again.tensors().items():
        assert torch.equal(value, getattr(chosen, name)), name
    assert (again.captions, again.parts, again.moves) == (
        chosen.captions,
        chosen.parts,
        chosen.moves,
    )
    for other in ({"seed": SEED + 1, "split": "held_out"}, {"seed": SEED, "split": "train"}):
        different = sample_layout(1, **other)
        assert different.caption != clips.captions[1]


def test_shapes_types_and_ids(clips: Clips) -> None:
    assert clips.rgb.shape == (6, 3, 56, 56, 3) and clips.rgb.dtype == torch.uint8
    assert clips.depth.dtype == torch.float16 and clips.objects.dtype == torch.uint8
    assert torch.equal(clips.c2w[:, 0], torch.eye(4).expand(6, 4, 4))
    for number, parts in enumerate(clips.parts):
        ids = clips.objects[number].unique()
        assert (ids[ids != NO_OBJECT] < len(parts)).all()
        assert all(f"{part.color} " in clips.captions[number] for part in parts)
    # No object exactly where there is no depth: the sky.
    assert torch.equal(clips.depth == 0, clips.objects == NO_OBJECT)
    assert (clips.depth[:, 0] > 0).all()
    # A picture, neither flat nor noise: neighbours agree, distant pixels do not.
    values = clips.rgb.float()
    assert values.std() > 30 and (values.diff(dim=3).abs().mean()) < 8


def test_the_unit_is_the_mean_distance_of_the_first_view(clips: Clips) -> None:
    distance, seen = unit_points(clips)
    mean = (distance * seen).flatten(1).sum(1) / seen.flatten(1).sum(1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=HALF, atol=0)


@pytest.mark.parametrize("move", [m for m in TRAJECTORIES if m != "free"])
def test_built_in_moves_are_those_of_inference(clips: Clips, move: str) -> None:
    made = make_clips(
        [0, 3], seed=SEED, split="held_out", frames=3, size=56, supersample=1, move=move
    )
    assert made.moves == (move, move) and made.captions == clips.take([0, 3]).captions
    assert torch.equal(made.depth[:, 0], clips.take([0, 3]).depth[:, 0])  # the same scene
    for i in range(2):
        scale = float(scene_scale(made.depth[i : i + 1, :1])[0])
        assert torch.equal(made.c2w[i], trajectory(move, 3, scale))


def test_depth_of_planes_is_exact() -> None:
    """The room alone, against the plane equation in float64."""
    layout = sample_layout(2, SEED, "train")
    scenes = _scene_tensors([layout], torch.device("cpu"))
    pose = layout.pose()
    slopes = np.random.default_rng(0).uniform(-0.5, 0.5, (64, 2))
    rays = np.concatenate([slopes, np.ones((64, 1))], 1) @ pose[:3, :3].T
    with np.errstate(divide="ignore"):
        ends = np.where(rays > 0, layout.bounds[1], layout.bounds[0])
        expected = ((ends - pose[:3, 3]) / rays).min(1)
    origin = tuple(torch.tensor(pose[i, 3]).float().reshape(1, 1, 1) for i in range(3))
    direction = tuple(torch.from_numpy(rays[:, i]).float().reshape(1, 1, -1) for i in range(3))
    distance, row = first_hits(scenes.rows, scenes.bounds, origin, direction, used=())  # type: ignore[arg-type]
    np.testing.assert_allclose(distance[0, 0].numpy(), expected, rtol=1e-5)
    assert (row < t.FACES).all()


def _one_solid(kind: int, row: int, half: tuple[float, float, float]) -> Tensor:
    """A table with one solid around (0, 0, 5), turned by 0.5; an arch has a hole of 0.6."""
    rows = torch.zeros(1, t.ROWS, t.COLUMNS)
    rows[:, :, t.HALF : t.HALF + 3] = -1
    turn = 0.0 if kind == t.ARCH else 0.5
    rows[0, row, : t.KIND + 1] = torch.tensor(
        [0, 0, 5, *half, math.cos(turn), math.sin(turn), 0.6, -0.1, 0, kind]
    )
    return rows


@pytest.mark.parametrize(
    ("kind", "row", "half"),
    [
        (t.BOX, t.FIRST_BOX, (0.5, 0.8, 0.3)),
        (t.SPHERE, t.FIRST_SPHERE, (0.7, 0.7, 0.7)),
        (t.CYLINDER, t.FIRST_CYLINDER, (0.5, 0.8, 0.5)),
        (t.ARCH, t.FIRST_ARCH, (0.9, 0.9, 0.3)),
    ],
)
def test_solids_are_met_on_their_surface(
    kind: int, row: int, half: tuple[float, float, float]
) -> None:
    """Rays end where the signed distance is zero, and pass where they never come near it."""
    rows = _one_solid(kind, row, half)
    bounds = torch.tensor([[[-9.0, -9, -9], [9, 9, 9]]])
    rays = torch.randn(3, 1, 1, 800, generator=torch.Generator().manual_seed(0)) * 0.12
    rays[2] = 1.0
    start = torch.tensor([0.2, -0.1, 0.0]).reshape(3, 1, 1, 1)
    origin, direction = tuple(start.unbind(0)), tuple(rays.unbind(0))
    distance, hit = first_hits(rows, bounds, origin, direction, used=[row])  # type: ignore[arg-type]
    table = rows.double().numpy()

    def away(at: Tensor) -> np.ndarray:  # at [T, 800] -> [T, 800] signed distances
        points = (start + rays * at).double().numpy()[:, 0]
        return p._distance(table[:, None, row], kind, np.moveaxis(points, 0, -1))

    met = (hit == row)[0, 0].numpy()
    assert 0.2 < met.mean() < 0.99
    np.testing.assert_allclose(away(distance[0])[0][met], 0, atol=1e-4)
    # Up to there, or all the way for those that pass, no ray is inside.
    steps = torch.linspace(0, 1, 201)[:, None]
    assert away(steps * distance[0].clamp(max=9)).min() > -1e-4


def test_paths_are_free() -> None:
    """Every built-in move and random paths, in many layouts."""
    count, frames = 60, 9
    layouts = [sample_layout(number, SEED, "train") for number in range(count)]
    poses = np.stack([layout.pose() for layout in layouts])
    unit, scale = _measure(_scene_tensors(layouts, torch.device("cpu")), poses, 16)
    for move in ("zoom_in", "zoom_out", "random"):
        _, c2w = _paths(range(count), SEED, "train", move, frames, layouts, poses, unit, scale)
        points = world_poses(c2w, unit, poses)[..., :3, 3]
        near = clearance(*_boundaries(layouts), points)
        assert near.min() >= CLEARANCE - 0.02, move
        if move == "random":
            lengths = np.linalg.norm(c2w[..., :3, 3], axis=-1).max(1)
            assert lengths.max() <= 0.8 and np.median(lengths) > 0.15


def _boundaries(layouts: list[Layout]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.stack([layout.rows for layout in layouts]),
        np.stack([layout.bounds for layout in layouts]),
        np.array([layout.courtyard for layout in layouts]),
    )


def test_shadows_and_supersampling() -> None:
    """More rays a pixel change colours at edges alone, and never the depth."""
    kwargs = {"seed": SEED, "split": "train", "frames": 1, "size": 32}
    coarse = make_clips([0], supersample=1, **kwargs)  # type: ignore[arg-type]
    fine = make_clips([0], supersample=2, **kwargs)  # type: ignore[arg-type]
    assert torch.equal(coarse.depth, fine.depth) and torch.equal(coarse.objects, fine.objects)
    difference = (coarse.rgb.int() - fine.rgb.int()).abs().amax(-1)
    assert 0 < (difference > 16).float().mean() < 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"numbers": []}, "no clip numbers"),
        ({"split": "test"}, "train or held_out"),
        ({"move": "zoom_sideways"}, "did you mean"),
        ({"size": 4}, "below 8"),
        ({"supersample": 0}, "outside 1 to 8"),
        ({"numbers": [-1]}, "at least 0"),
    ],
)
def test_wrong_requests(change: dict[str, object], words: str) -> None:
    request = {"numbers": [0], "seed": 0, "split": "train", "frames": 1, "size": 8} | change
    with pytest.raises(ValueError, match=words):
        make_clips(**request)  # type: ignore[arg-type]


def test_captions() -> None:
    corpus = caption_corpus(300, SEED)
    assert corpus[:2] == [sample_layout(n, SEED, "train").caption for n in range(2)]
    assert len(set(corpus)) > 290
    words = {word for text in corpus for word in text.replace(",", "").split()}
    assert words >= {*COLORS, "room", "courtyard", "brick", "sphere", "arch", "columns", "floor"}
    assert max(len(text.replace(",", " ,").split()) for text in corpus) <= 48
