"""Parts of the nano suite that go through the diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gen3r_engine.evaluation import measures, moves, text_colors
from gen3r_engine.evaluation.figures import Figure
from gen3r_engine.evaluation.held_out import ANOTHER, UNSEEN, held_out, requests
from gen3r_engine.evaluation.nano_context import Context

DEPTH_BAR, ALLVIEW_AUC_BAR, ONE_VIEW_AUC_BAR = 0.10, 0.7, 0.6
GAIN_BAR = 2.0  # dB over the repeated first frame
MOVES_BAR = 0.8  # share of paths that are named as asked; guessing gives 1/6
P_BAR = 0.05
GEOMETRY = frozenset({"depth", "cameras"})


def allview_part(context: Context) -> list[Figure]:
    """Reconstruction: all frames are given, the geometry comes through the transformer."""
    asked = requests(context.clips, "allview")
    found = context.sampler.generate(asked, told=lambda n, m: context.told("allview", n, m))
    context.keep("allview", found.video, found.depths)
    assert found.intrinsics is not None
    frames = context.clips.rgb.shape[1]
    true_k = context.clips.intrinsics.cpu()[:, None].expand(-1, frames, -1, -1)
    accuracy, completeness = measures.cloud_errors(
        found.depths,
        found.poses,
        found.intrinsics,
        context.true_depth,
        context.true_w2c,
        true_k,
    )
    aucs = measures.pose_aucs(found.poses, context.true_w2c)
    return [
        Figure(
            *("allview", "depth AbsRel", ""),
            *(measures.depth_errors(found.depths, context.true_depth), DEPTH_BAR, False),
            baselines=context.depth_baselines,
        ),
        *context.pose_figures("allview", "pose AUC@30", aucs, ALLVIEW_AUC_BAR),
        Figure("allview", "cloud accuracy", "scene units", accuracy, at_least=False),
        Figure("allview", "cloud completeness", "scene units", completeness, at_least=False),
        Figure(
            *("allview", "PSNR", "dB"),
            measures.frame_psnr(found.video, context.clips.rgb),
        ),
    ]


def two_view_part(context: Context) -> list[Figure]:
    """The first and the last frame and the cameras are given; the frames between are judged."""
    asked = requests(context.clips, "2view")
    found = context.sampler.generate(asked, told=lambda n, m: context.told("2view", n, m))
    context.keep("2view", found.video, found.depths)
    figures, gain = _against_first_frame(context, "2view", found.video)
    return [
        Figure("2view", "PSNR gain over the first frame", "dB", gain, GAIN_BAR),
        *figures,
        Figure(
            *("2view", "depth AbsRel", ""),
            measures.depth_errors(found.depths, context.true_depth),
            at_least=False,
            baselines=context.depth_baselines,
        ),
    ]


def one_view_part(context: Context) -> list[Figure]:
    """The first frame and the cameras are given; do the generated cameras follow them?"""
    asked = requests(context.clips, "1view")
    found = context.sampler.generate(asked, told=lambda n, m: context.told("1view", n, m))
    context.keep("1view", found.video, found.depths)
    figures, _ = _against_first_frame(context, "1view", found.video)
    auc = measures.pose_aucs(found.poses, context.true_w2c)
    return [
        *context.pose_figures("1view", "pose AUC@30 against the asked path", auc, ONE_VIEW_AUC_BAR),
        *figures,
    ]


def _against_first_frame(
    context: Context, part: str, video: Tensor
) -> tuple[list[Figure], tuple[float, ...]]:
    """PSNR, SSIM and LPIPS of the frames that were not given, and the gain in PSNR."""
    truth, frames = context.clips.rgb, UNSEEN[part]
    first = measures.repeat_first(truth)
    psnr = measures.frame_psnr(video, truth, frames)
    still = measures.frame_psnr(first, truth, frames)
    lpips, note = measures.frame_lpips(video, truth, frames)
    still_lpips, _ = measures.frame_lpips(first, truth, frames)
    return [
        Figure(part, "PSNR", "dB", psnr, baselines={"first frame": still}),
        Figure(
            *(part, "SSIM", "", measures.frame_ssim(video, truth, frames)),
            baselines={"first frame": measures.frame_ssim(first, truth, frames)},
        ),
        Figure(
            *(part, "LPIPS", "", lpips),
            at_least=False,
            baselines={"first frame": still_lpips} if still_lpips else {},
            note=note,
        ),
    ], measures.differences(psnr, still)


@dataclass(frozen=True)
class Moves:
    """Counts of asked (rows) and found (columns) moves, in the order of `moves.MOVES`."""

    confusion: list[list[int]]


def moves_part(context: Context) -> tuple[list[Figure], Moves]:
    """Every scene with each of the six built-in moves, asked by name."""
    clips, names = context.clips, moves.MOVES
    asked, wanted = [], []
    for index, name in enumerate(names):
        asked += requests(clips, "1view", name, noise=(index + 1) * ANOTHER)
        wanted += [name] * len(clips)
    told = context.told
    found = context.sampler.generate(asked, GEOMETRY, lambda n, m: told("moves", n, m))
    named = moves.classify(found.poses, found.depths[:, 0])
    right = [float(a == b) for a, b in zip(wanted, named, strict=True)]
    scenes = len(clips)
    shares = tuple(sum(right[n::scenes]) / len(names) for n in range(scenes))
    guess = (1 / len(names),) * scenes
    figure = Figure(
        *("moves", "named as asked", "", shares, MOVES_BAR), baselines={"guessing": guess}
    )
    return [figure], Moves(moves.confusion(wanted, named))


def text_part(context: Context, count: int) -> tuple[list[Figure], list[text_colors.Shift]]:
    """Captions with one colour word swapped: does the colour follow?"""
    frames, size = context.clips.rgb.shape[1:3]
    device = context.clips.rgb.device
    cases = text_colors.find_cases(count, seed=context.seed, size=size, device=device)
    if not cases:
        note = "no held-out scene hides a named part at first and shows it at last"
        return [Figure("text", "moves towards the named colour", "", (), note=note)], []
    clips = held_out(
        [case.number for case in cases],
        seed=context.seed,
        frames=frames,
        size=size,
        device=device,
        move=text_colors.MOVE,
    )
    captions = text_colors.swapped(clips.captions, cases)
    asked = [*requests(clips, "1view"), *requests(clips, "1view", captions=captions)]
    told = context.told
    both = context.sampler.generate(asked, frozenset({"rgb"}), lambda n, m: told("text", n, m))
    video = both.video
    shifts = text_colors.measure(cases, video[: len(cases)], video[len(cases) :], clips.objects)
    hits = [float(shift.shift > 0) for shift in shifts]
    whole = [float(shift.whole > 0) for shift in shifts]
    p = text_colors.p_value(sum(hits), len(shifts))
    coin = {"a coin": (0.5,) * len(shifts)}
    return [
        Figure(
            *("text", "outline moves towards the named colour", "", tuple(hits)),
            baselines=coin,
            note=f"{sum(hits):.0f} of {len(shifts)} scenes",
        ),
        Figure("text", "p-value of it", "", (p,), P_BAR, False, note="binomial, one-sided"),
        Figure(
            *("text", "whole frames move towards the named colour", "", tuple(whole)),
            baselines=coin,
            note=f"p-value {text_colors.p_value(sum(whole), len(shifts)):.2g}",
        ),
        Figure(
            *("text", "shift in the outline", "share of the way"),
            tuple(shift.shift / shift.full for shift in shifts),
        ),
        Figure(
            *("text", "shift of the whole frames", "share of the way"),
            tuple(shift.whole / shift.full for shift in shifts),
        ),
    ], shifts
