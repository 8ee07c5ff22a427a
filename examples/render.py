"""Draws the example inputs: photos and a video of a room that exists only in room.py.

    python examples/render.py       # rewrites the files beside this script (about ten minutes)

A small ray caster in numpy with soft shadows; units, axes and determinism as in room.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from room import (
    BOXES,
    LAMP,
    ROOM,
    ROOM_HIGH,
    ROOM_LOW,
    SKY,
    WINDOW,
    Box,
    color,
    noise,
    smooth_noise,
)

from gen3r.writers import save_video, write_cameras

FIELD_OF_VIEW = 62.0  # degrees, along the shorter side
CAMERA_SIZE = 112  # cameras.json is in pixels of this square


# -------------------------------------------------------------------------------------- ray casting


def slabs(
    origin: np.ndarray, direction: np.ndarray, box: Box
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distances at which rays [N, 3] enter and leave a box, and the axes of both faces."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (np.asarray(box.low) - origin) / direction
        second = (np.asarray(box.high) - origin) / direction
    near, far = np.minimum(first, second), np.maximum(first, second)
    return near.max(1), far.min(1), near.argmax(1), far.argmin(1)


def trace(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance [N], normal [N, 3] and box index [N] (-1: the room's shell) of the first hit."""
    _, distance, _, axis = slabs(origin, direction, ROOM)
    hit = np.full(len(origin), -1)
    for index, box in enumerate(BOXES):
        enter, leave, face, _ = slabs(origin, direction, box)
        closer = (enter < leave) & (enter > 1e-4) & (enter < distance)
        distance, axis = np.where(closer, enter, distance), np.where(closer, face, axis)
        hit = np.where(closer, index, hit)
    rows = np.arange(len(origin))
    normal = np.zeros_like(direction)
    normal[rows, axis] = -np.sign(direction[rows, axis])
    return distance, normal, hit


def blocked(point: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Whether furniture stands between points [N, 3] and targets [N, 3]."""
    direction = target - point
    shadow = np.zeros(len(point), dtype=bool)
    for box in BOXES[:-1]:  # the lamp's shade lets light through
        enter, leave, _, _ = slabs(point, direction, box)
        shadow |= (enter < leave) & (enter > 1e-3) & (enter < 1.0)
    return shadow


def in_window(point: np.ndarray) -> np.ndarray:
    """Whether wall points lie in the window's opening (a cross of bars left out)."""
    x, (top, bottom), (near, far) = WINDOW
    y, z = point[:, 1], point[:, 2]
    inside = (y > top) & (y < bottom) & (z > near) & (z < far) & (point[:, 0] < x + 0.01)
    frame = np.minimum(np.minimum(y - top, bottom - y), np.minimum(z - near, far - z)) < 0.05
    bars = (np.abs(z - (near + far) / 2) < 0.025) | (np.abs(y - (top + bottom) / 2) < 0.025)
    return inside & ~frame & ~bars


def outside(direction: np.ndarray) -> np.ndarray:
    """Sky and a tree line, seen through the window."""
    slope = direction[:, 1] / np.abs(direction[:, 0]).clip(1e-3)
    along = direction[:, 2] / np.abs(direction[:, 0]).clip(1e-3)
    trees = slope > -0.06 - 0.08 * smooth_noise(5 * along, 0 * along)
    sky = SKY * (0.75 + 0.35 * np.clip(-slope, 0, 1))[:, None]
    return np.where(trees[:, None], color("7d9a6b"), sky)


def light(point: np.ndarray, normal: np.ndarray, samples: int) -> np.ndarray:
    """Light arriving at points [N, 3]: window and lamp with shadows, plus a soft rest."""
    x, ys, zs = WINDOW
    side = int(np.sqrt(samples))
    steps = (np.arange(side) + 0.5) / side
    total = np.zeros_like(point)
    # One hash per point turns banding between shadow samples into fine grain.
    shift = (noise(point[:, 0] * 911, point[:, 1] * 677, point[:, 2] * 523) - 0.5) / side
    start = point + 1e-3 * normal
    for a in steps:
        for b in steps:
            y = ys[0] + (ys[1] - ys[0]) * np.clip(a + shift, 0, 1)
            z = zs[0] + (zs[1] - zs[0]) * np.clip(b - shift, 0, 1)
            target = np.stack([np.full_like(y, x + 0.02), y, z], axis=1)
            total += _lit(start, normal, target, 3.4 * SKY, True) / side**2
    for k in range(4):
        turn = 2 * np.pi * (k / 4 + shift)
        ring = 0.14 * np.stack([np.cos(turn), 0 * turn, np.sin(turn)], axis=1)
        total += _lit(start, normal, LAMP + ring, np.array([2.3, 1.85, 1.3]), False) / 4
    # The rest: light that walls return, weaker in corners and under things.
    walls_near = np.minimum(point - ROOM_LOW, ROOM_HIGH - point).clip(0)
    open_space = np.prod(1 - 0.45 * np.exp(-3.0 * walls_near), axis=1)
    tint = np.array([0.42, 0.41, 0.39])
    return total + (open_space * (1.0 - 0.22 * normal[:, 1]))[:, None] * tint


def _lit(
    point: np.ndarray, normal: np.ndarray, target: np.ndarray, power: np.ndarray, area: bool
) -> np.ndarray:
    path = target - point
    square = (path**2).sum(1).clip(0.05)
    toward = path / np.sqrt(square)[:, None]
    facing = (toward * normal).sum(1).clip(0)
    if area:  # a window sends its light along its own normal (+x), so less to the side
        facing = facing * (-toward[:, 0]).clip(0)
    facing = np.where(blocked(point, target), 0.0, facing)
    return (facing / square)[:, None] * power


def shade(origin: np.ndarray, direction: np.ndarray, samples: int) -> np.ndarray:
    """Linear radiance [N, 3] along rays."""
    distance, normal, hit = trace(origin, direction)
    point = origin + distance[:, None] * direction
    albedo = np.zeros_like(point)
    for index in np.unique(hit):
        chosen = hit == index
        texture = (ROOM if index < 0 else BOXES[index]).texture
        albedo[chosen] = texture(point[chosen], normal[chosen])
    out = albedo * light(point, normal, samples)
    glass = (hit < 0) & in_window(point)
    out[glass] = outside(direction[glass])
    frame = (hit < 0) & ~glass & _near_window(point)
    out[frame] = color("f4f1ea") * 0.8
    lamp = hit == len(BOXES) - 1
    out[lamp] = color("ffe2ad") * 1.15
    return out


def _near_window(point: np.ndarray) -> np.ndarray:
    x, (top, bottom), (near, far) = WINDOW
    y, z = point[:, 1], point[:, 2]
    return (
        (point[:, 0] < x + 0.01) & (y > top - 0.06) & (y < bottom + 0.06)
        & (z > near - 0.06) & (z < far + 0.06)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ cameras


def look(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World-to-camera [4, 4] of a level camera at `eye` that looks at `target`."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose


def path(frames: int) -> np.ndarray:
    """A slow walk from the left to the right with the eyes on the table: [F, 4, 4]."""
    poses = []
    for t in np.linspace(0, 1, frames):
        eased = t * t * (3 - 2 * t)
        eye = np.array([-1.05 + 1.9 * eased, -1.38 - 0.08 * np.sin(np.pi * t), -1.15 + 0.3 * eased])
        poses.append(look(eye, np.array([0.12 - 0.1 * eased, -0.78, 2.2])))
    return np.stack(poses)


def intrinsics(height: int, width: int) -> np.ndarray:
    """[3, 3] in pixels, the principal point in the middle."""
    focal = min(height, width) / (2 * np.tan(np.radians(FIELD_OF_VIEW) / 2))
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def render(
    pose: np.ndarray, height: int, width: int, *, over: int = 2, samples: int = 9
) -> np.ndarray:
    """One picture, uint8 [H, W, 3], with over x over rays a pixel."""
    k = intrinsics(height * over, width * over)
    v, u = np.mgrid[0 : height * over, 0 : width * over] + 0.5
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], axis=-1)
    rays = (rays.reshape(-1, 3) @ pose[:3, :3]).astype(np.float64)
    eye = -pose[:3, :3].T @ pose[:3, 3]
    parts = [
        shade(np.broadcast_to(eye, chunk.shape), chunk, samples)
        for chunk in np.array_split(rays, max(1, len(rays) // 100_000))
    ]
    linear = np.concatenate(parts).reshape(height, over, width, over, 3)
    # Exposure, then a shoulder that keeps the window from clipping hard (Reinhard, white at 2.5).
    toned = 1.05 * linear
    toned = toned * (1 + toned / 2.5**2) / (1 + toned) * 1.55
    pixels = np.clip(toned.mean(axis=(1, 3)), 0, 1) ** (1 / 2.2)
    return np.rint(pixels * 255).astype(np.uint8)


PROMPT = (
    "A bright living room with an oak floor, a blue sofa under a landscape painting, a patterned "
    "rug, a bookcase, and daylight from a window on the left."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out: Path = parser.parse_args().out
    poses = path(17)
    for task in ("1view", "2view", "allview"):
        (out / task).mkdir(parents=True, exist_ok=True)
        (out / task / "prompts.txt").write_text(PROMPT + "\n", encoding="utf-8")
    photo = render(poses[7], 360, 480)
    Image.fromarray(photo).save(out / "1view" / "photo.jpg", quality=88)
    for name, pose in (("first", poses[0]), ("last", poses[-1])):
        Image.fromarray(render(pose, 280, 280)).save(out / "2view" / f"{name}.jpg", quality=88)
    camera = np.repeat(intrinsics(CAMERA_SIZE, CAMERA_SIZE)[None], len(poses), axis=0)
    write_cameras(out / "2view" / "cameras.json", poses.round(6), camera.round(4))
    frames = np.stack([render(pose, 224, 224) for pose in poses])
    save_video(frames, out / "allview" / "room.mp4", crf=24)


if __name__ == "__main__":
    main()
