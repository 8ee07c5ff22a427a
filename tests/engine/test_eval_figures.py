"""Figures of the suites: intervals, bars, names of moves, colours, clouds, on made-up values."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from gen3r.cameras import invert_pose, trajectory
from gen3r_engine.evaluation import measures, moves, text_colors
from gen3r_engine.evaluation.figures import Figure, bootstrap_interval
from gen3r_engine.evaluation.held_out import held_out
from gen3r_engine.evaluation.report import figure_table
from gen3r_engine.evaluation.sheet import COLUMNS, GAP, LABEL, Row, contact_sheet
from gen3r_training.procedural import COLORS, Part


def test_intervals_and_bars() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = bootstrap_interval(values.tolist())
    assert low < values.mean() < high
    # The normal approximation: 1.96 standard errors on either side.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert all(math.isnan(x) for x in bootstrap_interval([]))
    enough = Figure("vae", "PSNR", "dB", (30.0, 26.0), 27.0)
    too_much = Figure("adapter", "AbsRel", "", (0.1,), 0.03, False)
    nothing = Figure("vae", "LPIPS", "", (), 0.1, False, note="no weights")
    assert (enough.holds, too_much.holds, nothing.holds) == (True, False, None)
    infinite = Figure("x", "PSNR", "dB", (math.inf,)).to_dict()
    assert json.dumps(infinite, allow_nan=False) and infinite["values"] == [None]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(figure_table([enough, too_much, nothing], "title"))
    text = console.export_text()
    assert ">= 27" in text and "NO" in text and "not measured" in text


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_moves_are_named(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = torch.stack([trajectory(name, 9, 0.8 * scale).double() for name in moves.MOVES])
    world = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    paths = paths + 0.02 * torch.randn(paths.shape, generator=generator, dtype=torch.float64)
    depth = torch.full((6, 8, 8), scale)
    assert moves.classify(invert_pose(paths), depth) == list(moves.MOVES)
    # Another world frame changes nothing, and half of the way still has the name.
    assert moves.classify(invert_pose(world @ paths), depth) == list(moves.MOVES)
    half = torch.stack([trajectory(name, 9, 0.4 * scale).double() for name in moves.MOVES])
    features = moves.path_features(invert_pose(half), depth)
    assert features[0, -1].tolist() == pytest.approx([0, 0, 0.5])
    assert features[2, -1].tolist() == pytest.approx([-1, 0, 0], abs=1e-6)
    table = moves.confusion(["zoom_in", "zoom_in", "arc_left"], ["zoom_in", "zoom_out", "arc_left"])
    assert table[0][:2] == [1, 1] and table[2][2] == 1 and sum(map(sum, table)) == 3


def test_lab_and_the_other_colors() -> None:
    # Lindbloom's values for the primaries of sRGB under D65.
    assert text_colors.lab(np.array([1.0, 0, 0])) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    assert text_colors.lab(np.array([1.0, 1, 1])) == pytest.approx([100, 0, 0], abs=1e-3)
    for name in COLORS:
        for number in range(9):
            other = text_colors.other_color(name, number)
            distance = text_colors.hue_plane(other) - text_colors.hue_plane(name)
            assert np.linalg.norm(distance) >= text_colors.APART
            assert other not in ("white", "grey", "black")


def test_colors_that_move_are_counted() -> None:
    part = Part("sphere", "red", "sphere")
    cases = [text_colors.Case(n, 0, part, "green") for n in range(3)]
    objects = torch.full((3, 5, 8, 8), 255, dtype=torch.uint8)
    objects[:2, -1, 2:4, 2:4] = 0  # the third scene does not show the part
    before = torch.full((3, 5, 8, 8, 3), 128, dtype=torch.uint8)
    after = before.clone()
    inside = objects == 0
    before[inside] = torch.tensor([204, 38, 33], dtype=torch.uint8)
    after[0][inside[0]] = torch.tensor([56, 153, 66], dtype=torch.uint8)
    after[1][inside[1]] = torch.tensor([255, 20, 10], dtype=torch.uint8)
    shifts = text_colors.measure(cases, before, after, objects)
    assert [shift.case.number for shift in shifts] == [0, 1]
    assert shifts[0].shift == pytest.approx(shifts[0].full, rel=0.02)
    assert shifts[1].shift < 0 < shifts[0].whole < shifts[0].shift
    assert text_colors.p_value(5, 5) == pytest.approx(1 / 32)


def test_cases_hide_at_first_and_show_at_last() -> None:
    cases = text_colors.find_cases(2, seed=5, size=40, device="cpu", most=32)
    assert len(cases) == 2
    numbers = [case.number for case in cases]
    clips = held_out(
        numbers, seed=5, frames=2, size=40, device=torch.device("cpu"), move=text_colors.MOVE
    )
    for n, case in enumerate(cases):
        shown = [(clips.objects[n, i] == case.index).float().mean().item() for i in (0, 1)]
        assert shown[0] < text_colors.HIDDEN and shown[1] > text_colors.SEEN
        assert clips.parts[n][case.index] == case.part
    for case, old, new in zip(
        cases, clips.captions, text_colors.swapped(clips.captions, cases), strict=True
    ):
        assert old != new and case.color in new


def test_clouds_and_frames_of_the_truth_are_right() -> None:
    clips = held_out([0], seed=5, frames=2, size=40, device=torch.device("cpu"), move="zoom_in")
    depth, w2c = clips.depth.float(), invert_pose(clips.c2w.double())
    k = clips.intrinsics[:, None].expand(-1, 2, -1, -1)
    seen = (depth[0, 0] > 0).flatten().nonzero().flatten()
    mean = measures.unproject(depth[0], w2c[0], k[0], seen).norm(dim=-1).mean()
    assert float(mean) == pytest.approx(1.0, abs=0.01)  # the scene unit
    moved = w2c.clone()
    moved[..., :3, 3] *= 2  # the same scene at twice the size
    for errors in measures.cloud_errors(2 * depth, moved, k, depth, w2c, k):
        assert errors[0] < 1e-6
    assert measures.cloud_errors(depth * math.nan, w2c, k, depth, w2c, k)[0] == (math.inf,)
    assert measures.depth_errors(3 * depth, depth) == pytest.approx((0.0,), abs=1e-6)
    assert measures.depth_errors(0 * depth, depth) == (math.inf,)
    assert measures.pose_aucs(w2c, w2c) == (1.0,)
    assert measures.pose_aucs(w2c * math.nan, w2c) == (0.0,)
    still = measures.repeat_first(clips.rgb)
    assert measures.frame_psnr(still, clips.rgb, slice(0, 1)) == (measures.PSNR_CAP,)
    assert measures.frame_psnr(still, clips.rgb)[0] < measures.PSNR_CAP


def test_a_contact_sheet() -> None:
    rows = [Row("a", np.zeros((9, 20, 30, 3), np.uint8)), Row("b", np.ones((2, 20, 30, 3), "u1"))]
    sheet = contact_sheet(rows)
    assert sheet.size == (LABEL + COLUMNS * (30 + GAP), 2 * (20 + GAP))
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
