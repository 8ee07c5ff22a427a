"""What a viewer shows: points by frame with how sure they are, frames, cameras."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gen3r.scene import Scene
from gen3r_engine.formats.cameras import FrameCameras, frame_cameras, frustum_size

MAX_POINTS = 1_000_000
_FAR = 3.0  # points further from the middle than this many times the inner 98 % are not shown
_SAMPLE = 200_000  # points that decide what is far


@dataclass(frozen=True)
class SceneView:
    """A scene thinned out for a browser.

    points : [N, 3] float32 world, finite, by frame and in random order within a frame
    colors : [N, 3] uint8
    starts : [F + 1] int64, frame f owns points[starts[f] : starts[f + 1]]; None where the cloud is
        not divided into frames
    sureness : [N] uint8, the percentage of points that are less sure; None where not known
    frames : [F, H, W, 3] uint8; None without
    cameras : of the frames that have one; None without. height, width : their pixels
    frustum : length of a frustum in the world
    title : the prompt
    missing : what could not be shown for want of a file, and which
    notes : what was left out
    """

    points: NDArray[np.float32]
    colors: NDArray[np.uint8]
    starts: NDArray[np.int64] | None
    sureness: NDArray[np.uint8] | None
    frames: NDArray[np.uint8] | None
    cameras: FrameCameras | None
    height: int
    width: int
    frustum: float
    title: str = ""
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of frames that a slider runs over; at least 1."""
        if self.frames is not None:
            return len(self.frames)
        if self.starts is not None:
            return len(self.starts) - 1
        return int(self.cameras.frames[-1]) + 1 if self.cameras and len(self.cameras) else 1


def scene_view(scene: Scene, title: str = "", max_points: int = MAX_POINTS) -> SceneView:
    """The view of a scene in memory. ValueError for cameras with skew, or max_points below 1."""
    return view_of_arrays(
        points=np.asarray(scene.points),
        mask=np.asarray(scene.mask, dtype=bool),
        confidence=np.asarray(scene.depth_confidence),
        frames=np.asarray(scene.rgb),
        cameras=frame_cameras(scene.extrinsics, scene.intrinsics),
        title=title,
        max_points=max_points,
    )


def view_of_arrays(
    *,
    points: NDArray[np.floating],  # [F, H, W, 3]
    mask: NDArray[np.bool_],  # [F, H, W]
    confidence: NDArray[np.floating],  # [F, H, W]
    frames: NDArray[np.uint8],  # [F, H, W, 3]
    cameras: FrameCameras,
    title: str = "",
    max_points: int = MAX_POINTS,
) -> SceneView:
    """At most `max_points` of the masked, finite points, the same share of every frame."""
    height, width = frames.shape[1:3]
    kept = mask & np.isfinite(points).all(axis=-1)
    chosen, starts = _choose(kept.reshape(len(frames), -1), max_points)
    xyz = points.reshape(-1, 3)[chosen].astype(np.float32)
    near = within_reach(xyz)
    sure = np.nan_to_num(confidence.reshape(-1)[chosen], nan=-np.inf)
    starts = np.concatenate([[0], np.cumsum(near)])[starts]
    notes = [] if near.all() else [f"{int((~near).sum())} far points are not shown"]
    return SceneView(
        points=xyz[near],
        colors=frames.reshape(-1, 3)[chosen][near],
        starts=starts,
        sureness=_percentages(sure)[near],
        frames=frames,
        cameras=cameras,
        height=height,
        width=width,
        frustum=frustum_size(xyz[near]),
        title=title,
        notes=notes,
    )


def _choose(
    kept: NDArray[np.bool_],  # [F, P]
    most: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flat indices of the points shown, by frame, and the frames' starts among them [F + 1]."""
    if most < 1:
        raise ValueError(f"max_points {most} is below 1; use {MAX_POINTS} or fewer")
    random = np.random.default_rng(0)
    share = min(1.0, most / max(1, int(kept.sum())))
    parts = []
    for frame, row in enumerate(kept):
        indices = random.permutation(np.flatnonzero(row))
        parts.append(indices[: int(len(indices) * share)] + frame * row.size)
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def within_reach(points: NDArray[np.float32]) -> NDArray[np.bool_]:  # [N, 3] -> [N]
    """Whether a point lies within `_FAR` times the inner 98 % of the middle along every axis.

    A few points at the horizon would otherwise take all of a viewer's precision.
    """
    if not len(points):
        return np.zeros(0, dtype=bool)
    sample = points[:: max(1, len(points) // _SAMPLE)]
    low, middle, high = np.percentile(sample, [1.0, 50.0, 99.0], axis=0)
    reach = _FAR * np.maximum(high - middle, middle - low).max()
    return np.asarray((np.abs(points - middle) <= max(reach, 1e-6)).all(axis=1))


def _percentages(confidence: NDArray[np.floating]) -> NDArray[np.uint8]:  # [N] -> [N]
    """The percentage of points that are less sure, 0 to 100."""
    order = np.sort(confidence)
    below = np.searchsorted(order, confidence, side="left")
    return np.asarray(np.floor(100.0 * below / max(1, len(order))), dtype=np.uint8)
