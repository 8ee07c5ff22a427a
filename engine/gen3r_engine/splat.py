"""A small point renderer in numpy: a coloured cloud seen from a chosen camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_POINTS = 600_000  # more than the picture has pixels several times over


@dataclass(frozen=True)
class Viewpoint:
    """A pinhole camera: rotation [3, 3] and eye [3] (world), focal length and size in pixels."""

    rotation: np.ndarray
    eye: np.ndarray
    focal: float
    width: int
    height: int

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions [N, 2] and depths [N] of world points [N, 3]."""
        local = (points - self.eye) @ self.rotation.T
        z = local[:, 2]
        safe = np.where(np.abs(z) < 1e-9, 1e-9, z)
        x = self.focal * local[:, 0] / safe + self.width / 2
        y = self.focal * local[:, 1] / safe + self.height / 2
        return np.stack([x, y], axis=1), z


def orbit(
    points: np.ndarray,  # [N, 3] world, finite
    reference: np.ndarray,  # [4, 4] world to camera
    *,
    yaw: float,
    pitch: float,
    width: int,
    height: int,
) -> Viewpoint:
    """A view of the whole cloud, `yaw` and `pitch` degrees around it from a reference camera.

    The camera looks at the cloud's median from so far away that 96 % of the points lie inside.
    """
    centre = np.median(points, axis=0)
    a, b = np.radians(yaw), np.radians(pitch)
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    rotation = turn_x @ turn_y @ reference[:3, :3]
    local = (points - centre) @ rotation.T
    focal = 1.1 * min(width, height)
    # Distance at which a point just touches the picture's edge: |x| focal / (z + d) = width / 2.
    needed = np.maximum(
        np.abs(local[:, 0]) * 2 * focal / width, np.abs(local[:, 1]) * 2 * focal / height
    )
    distance = max(float(np.percentile(needed - local[:, 2], 96)), 1e-6)
    return Viewpoint(rotation, centre - rotation.T @ [0, 0, distance], focal, width, height)


def render(
    points: np.ndarray,  # [N, 3] world, finite
    colors: np.ndarray,  # [N, 3] uint8
    view: Viewpoint,
    background: tuple[int, int, int],
) -> np.ndarray:
    """Draw every point as a small square, nearest on top: uint8 [height, width, 3].

    Squares grow with nearness, so that close surfaces look closed. At most 600 000 are drawn.
    """
    image = np.empty((view.height, view.width, 3), dtype=np.uint8)
    image[:] = background
    step = max(1, -(-len(points) // MAX_POINTS))
    points, colors = points[::step], colors[::step]
    if not len(points):
        return image
    pixels, depth = view.project(points)
    front = depth > 0.02 * np.median(np.abs(depth))
    near = pixels[:, 0].clip(-9, view.width + 9), pixels[:, 1].clip(-9, view.height + 9)
    column, row = (np.floor(axis).astype(np.int64) for axis in near)
    buffer = np.full(view.height * view.width, np.inf)
    flat = image.reshape(-1, 3)
    for size, chosen in _sizes(depth, front, view):
        offsets = range(-((size - 1) // 2), size // 2 + 1)
        for dy in offsets:
            for dx in offsets:
                y, x = row[chosen] + dy, column[chosen] + dx
                inside = (y >= 0) & (y < view.height) & (x >= 0) & (x < view.width)
                _paint(
                    flat,
                    buffer,
                    (y * view.width + x)[inside],
                    depth[chosen][inside],
                    colors[chosen][inside],
                )
    return image


def _sizes(depth: np.ndarray, front: np.ndarray, view: Viewpoint) -> list[tuple[int, np.ndarray]]:
    """Square sizes in pixels and the points drawn with each."""
    share = np.sqrt(view.width * view.height / max(1, int(front.sum())))
    middle = np.median(depth[front]) if front.any() else 1.0
    wanted = 2.2 * share * middle / np.where(front, depth, middle)
    size = np.clip(np.rint(wanted), 1, 7).astype(np.int64)
    return [(s, np.flatnonzero(front & (size == s))) for s in range(1, 8)]


def _paint(
    image: np.ndarray,  # [P, 3] uint8, changed
    buffer: np.ndarray,  # [P] nearest depth so far, changed
    pixel: np.ndarray,  # [N] indices into both
    depth: np.ndarray,  # [N]
    colors: np.ndarray,  # [N, 3] uint8
) -> None:
    np.minimum.at(buffer, pixel, depth)
    top = depth <= buffer[pixel]
    image[pixel[top]] = colors[top]
