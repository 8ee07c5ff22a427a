"""Draws the example inputs: photos and a video of a room that exists only in this file.

    python examples/render.py       # rewrites the files beside this script (about ten minutes)

A small ray caster in numpy: boxes with procedural textures, a window, a lamp, soft shadows.
Units are metres; x right, y down, z forward (OpenCV); floor at y = 0, ceiling at y = -2.6.
Deterministic: there are no random numbers, only hashes of positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gen3r.media import save_video, write_cameras

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]  # points, normals [N, 3] -> albedo [N, 3]

ROOM_LOW, ROOM_HIGH = np.array([-2.3, -2.6, -1.9]), np.array([2.3, 0.0, 3.6])
WINDOW = (-2.3, (-2.05, -0.85), (0.9, 2.5))  # x, y range, z range of the left wall's opening
LAMP = np.array([0.5, -2.25, 1.6])
SKY = np.array([1.15, 1.3, 1.5])
FIELD_OF_VIEW = 62.0  # degrees, along the shorter side
CAMERA_SIZE = 112  # cameras.json is in pixels of this square


@dataclass(frozen=True)
class Box:
    """An axis-aligned box with a texture."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    texture: Texture


# ---------------------------------------------------------------------------------------- textures


def color(hexadecimal: str) -> np.ndarray:
    """Linear RGB of an sRGB "rrggbb"."""
    values = np.array([int(hexadecimal[i : i + 2], 16) for i in (0, 2, 4)]) / 255.0
    return values**2.2


def noise(*cells: np.ndarray) -> np.ndarray:
    """A hash of integer cells, uniform in [0, 1)."""
    total = sum(
        np.sin(np.floor(c) * k) * 43758.5453
        for c, k in zip(cells, (12.9898, 78.233, 37.719), strict=False)
    )
    return np.asarray(total) % 1.0


def smooth_noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Value noise in [0, 1), one cell a unit."""
    fx, fy = x % 1.0, y % 1.0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    top = noise(x, y) * (1 - fx) + noise(x + 1, y) * fx
    bottom = noise(x, y + 1) * (1 - fx) + noise(x + 1, y + 1) * fx
    return top * (1 - fy) + bottom * fy


def plain(hexadecimal: str) -> Texture:
    """One colour with a little mottling."""
    base = color(hexadecimal)

    def texture(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        mottle = smooth_noise(9 * (p[:, 0] + p[:, 2]), 9 * p[:, 1])
        return base * (0.92 + 0.16 * mottle)[:, None]

    return texture


def planks(hexadecimal: str, width: float, length: float) -> Texture:
    """Boards along z with staggered joints and grain."""
    base = color(hexadecimal)

    def texture(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        board = p[:, 0] / width
        along = p[:, 2] / length + 0.37 * np.floor(board)
        tone = 0.72 + 0.5 * noise(board, along)
        grain = smooth_noise(board * 14, p[:, 2] * 2.2) - 0.5
        seam = (np.abs(board % 1.0 - 0.5) > 0.485) | (np.abs(along % 1.0 - 0.5) > 0.497)
        shade = np.where(seam, 0.45, tone + 0.28 * grain)
        return base * shade[:, None]

    return texture


def walls(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Floor of oak, ceiling of plaster, walls of two colours with a skirting board."""
    out = np.broadcast_to(color("e9e3d6"), p.shape) * 1.0
    floor, side = n[:, 1] < -0.5, np.abs(n[:, 1]) < 0.5
    out[floor] = planks("b98553", 0.16, 1.3)(p[floor], n[floor])
    back = side & (n[:, 2] < -0.5)
    out[side] = color("dcd3c1")
    out[back] = color("6d8f8c")
    out[side] *= (0.96 + 0.08 * smooth_noise(6 * (p[side, 0] + p[side, 2]), 6 * p[side, 1]))[
        :, None
    ]
    out[side & (p[:, 1] > -0.11)] = color("f1ede4")
    return out


def rug(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """A woven rug: border, stripes and diamonds."""
    x, z = p[:, 0], p[:, 2] - 1.35
    edge = np.maximum(np.abs(x - 0.1) / 1.15, np.abs(z) / 0.85)
    diamond = (np.abs((x * 2.5) % 1 - 0.5) + np.abs((z * 2.5) % 1 - 0.5)) < 0.33
    out = np.where(diamond[:, None], color("e6d3ac"), color("a8483f"))
    out = np.where((edge > 0.80)[:, None], color("2f4560"), out)
    out = np.where(((edge > 0.86) & (edge < 0.91))[:, None], color("e6d3ac"), out)
    weave = 0.9 + 0.2 * noise(x * 70, z * 70)
    return out * weave[:, None]


def books(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Shelves of book spines on the front, wood elsewhere."""
    palette = np.stack(
        [color(c) for c in ("8c2f39", "1f4e5f", "d9a441", "3f6b4b", "e8e0cf", "5b4a72", "c4622d")]
    )
    shelf = (p[:, 1] + 2.0) / 0.4
    across = p[:, 0] / 0.052 + 17.3 * np.floor(shelf)
    index = (noise(across, shelf) * len(palette)).astype(int)
    height = 0.68 + 0.24 * noise(across + 3, shelf)
    inside = 1 - shelf % 1.0
    spine = palette[index] * (0.75 + 0.25 * np.sin(np.pi * (across % 1.0)))[:, None]
    band = (np.abs(inside - 0.5 * height) < 0.05) & (noise(across + 9, shelf) > 0.5)
    spine = np.where(band[:, None], color("efe3c4"), spine)
    wood = color("7a5230")
    out = np.where((inside < height)[:, None], spine, 0.18 * wood)
    board = (shelf % 1.0 > 0.91) | (np.abs(p[:, 0] - 1.5) > 0.56)
    out = np.where(board[:, None], wood, out)
    return np.where((n[:, 2] < -0.5)[:, None], out, wood)


def painting(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Hills under a low sun, in a dark frame."""
    u, v = (p[:, 0] + 0.55) / 1.1, (p[:, 1] + 1.95) / 0.8
    sky = color("f2b880") * (1 - v)[:, None] + color("f7e3c0") * v[:, None]
    out = np.where((np.hypot((u - 0.66) * 1.375, v - 0.42) < 0.11)[:, None], color("fff4d0"), sky)
    for base, wave, shade in ((0.55, 5.0, "7f8fa6"), (0.66, 8.0, "4d6a6d"), (0.8, 4.0, "2c4a3e")):
        hill = base + 0.06 * np.sin(wave * u + 9 * base) + 0.02 * np.sin(3.1 * wave * u)
        out = np.where((v > hill)[:, None], color(shade), out)
    frame = (np.abs(u - 0.5) > 0.46) | (np.abs(v - 0.5) > 0.45)
    return np.where(frame[:, None], color("2a211b"), out)


def blanket(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Broad stripes of wool."""
    stripe = (p[:, 0] / 0.22) % 1.0
    out = np.where((stripe < 0.18)[:, None], color("e9dcc0"), color("c9772f"))
    out = np.where(((stripe > 0.5) & (stripe < 0.6))[:, None], color("35556b"), out)
    return out * (0.85 + 0.3 * noise(p[:, 0] * 60, p[:, 1] * 60, p[:, 2] * 60))[:, None]


OAK, DARK = planks("9a6a3c", 0.09, 0.9), planks("5d3d26", 0.09, 0.9)
BOXES = (
    Box((-1.05, -0.015, 0.5), (1.25, 0.0, 2.2), rug),
    Box((0.92, -2.02, 3.2), (2.08, 0.0, 3.6), books),
    Box((-0.55, -1.95, 3.55), (0.55, -1.15, 3.6), painting),
    # The sofa under the painting: seat, back, arms, cushions.
    Box((-1.0, -0.42, 2.62), (0.7, -0.1, 3.45), plain("48617a")),
    Box((-1.0, -0.86, 3.25), (0.7, -0.1, 3.52), plain("41586f")),
    Box((-1.2, -0.62, 2.62), (-1.0, -0.02, 3.52), plain("3c5268")),
    Box((0.7, -0.62, 2.62), (0.9, -0.02, 3.52), plain("3c5268")),
    Box((-0.95, -0.76, 3.02), (-0.5, -0.42, 3.25), plain("d8a24a")),
    Box((0.25, -0.74, 3.04), (0.66, -0.42, 3.25), plain("b5483f")),
    Box((-0.35, -0.45, 2.6), (0.15, -0.12, 3.2), blanket),
    # A low table with a bowl-like box and two books on it.
    Box((-0.45, -0.42, 1.2), (0.6, -0.37, 1.8), OAK),
    *(
        Box((x, -0.37, z), (x + 0.05, -0.015, z + 0.05), DARK)
        for x in (-0.42, 0.52)
        for z in (1.23, 1.72)
    ),
    Box((-0.3, -0.46, 1.35), (0.0, -0.42, 1.58), plain("24506b")),
    Box((-0.27, -0.49, 1.38), (-0.04, -0.46, 1.56), plain("c94f3d")),
    Box((0.28, -0.52, 1.42), (0.42, -0.42, 1.56), plain("f0e9da")),
    # A cabinet at the right wall with a plant on it.
    Box((1.75, -0.8, 0.9), (2.3, -0.06, 2.3), DARK),
    Box((1.85, -0.98, 1.45), (2.1, -0.8, 1.7), plain("c7d0cf")),
    *(
        Box((x, y, z), (x + 0.15, y + 0.24, z + 0.15), plain(tone))
        for x, y, z, tone in (
            *((1.82, -1.28, 1.42, "4f7f45"), (1.98, -1.36, 1.55, "5f9150")),
            *((1.90, -1.50, 1.48, "74a65c"), (2.05, -1.22, 1.44, "457339")),
        )
    ),
    # The lamp's cord and shade.
    Box((0.49, -2.6, 1.59), (0.51, -2.2, 1.61), plain("1c1a18")),
    Box((0.3, -2.2, 1.4), (0.7, -2.0, 1.8), plain("f3d9a0")),
)
ROOM = Box(tuple(ROOM_LOW), tuple(ROOM_HIGH), walls)


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
