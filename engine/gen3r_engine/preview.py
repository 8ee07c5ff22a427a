"""preview.png: one picture that tells what went in and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gen3r_engine.splat import MAX_POINTS, Viewpoint, orbit, render

WIDTH = 1400
_MARGIN, _GAP, _LABEL = 28, 8, 26
_FRAMES = 8
_TOP = 420  # height of the row with the views and the cloud
_BACKGROUND, _PANEL = (18, 19, 22), (27, 29, 33)
_TEXT, _QUIET, _ACCENT = (236, 237, 240), (150, 154, 163), (255, 168, 80)
_ANGLES = ((-28.0, 16.0), (34.0, 24.0))  # yaw, pitch in degrees of the two looks at the cloud


@dataclass(frozen=True)
class PreviewContent:
    """What the sheet shows.

    views : uint8 [H, W, 3] each; rgb, depth : uint8 [F, H, W, 3]
    points [N, 3] float, colors [N, 3] uint8; extrinsics [F, 4, 4] world to camera
    """

    title: str
    subtitle: str
    views: Sequence[np.ndarray]
    rgb: np.ndarray
    depth: np.ndarray
    points: np.ndarray
    colors: np.ndarray
    extrinsics: np.ndarray


def contact_sheet(content: PreviewContent) -> Image.Image:
    """The sheet, 1400 pixels wide: views and cloud above, 8 frames and their depths below."""
    inner = WIDTH - 2 * _MARGIN
    frames, height, width = content.rgb.shape[:3]
    shown = np.unique(np.linspace(0, frames - 1, _FRAMES).round().astype(int))
    cell = (inner - (_FRAMES - 1) * _GAP) // _FRAMES
    strip = round(cell * height / width)
    head = _MARGIN + 62
    rows = [head, head + _LABEL + _TOP + 20]
    rows.append(rows[1] + _LABEL + strip + 18)
    sheet = Image.new("RGB", (WIDTH, rows[2] + _LABEL + strip + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _title(draw, content)

    side = round(0.33 * inner)
    count = len(content.views)
    _label(draw, _MARGIN, rows[0], "view" if count == 1 else f"{count} views")
    _views(sheet, content.views, (_MARGIN, rows[0] + _LABEL, side, _TOP))
    look = (inner - side - 2 * _GAP) // 2
    for index, (yaw, pitch) in enumerate(_ANGLES):
        left = _MARGIN + side + _GAP + index * (look + _GAP)
        text = f"point cloud from the left, {len(content.points):,} points"
        text = text if index == 0 else "from the right"
        _label(draw, left, rows[0], text)
        sheet.paste(_cloud(content, yaw, pitch, look, _TOP), (left, rows[0] + _LABEL))

    for row, name, clip in ((rows[1], "frame", content.rgb), (rows[2], "depth", content.depth)):
        for position, frame in enumerate(shown):
            left = _MARGIN + position * (cell + _GAP)
            _label(draw, left, row, f"{name} {frame}")
            picture = Image.fromarray(clip[frame]).resize((cell, strip), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, row + _LABEL))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _title(draw: ImageDraw.ImageDraw, content: PreviewContent) -> None:
    room = WIDTH - 2 * _MARGIN
    title, subtitle = _font(26), _font(16)
    draw.text((_MARGIN, _MARGIN - 8), _fit(draw, content.title, title, room), _TEXT, title)
    text = _fit(draw, content.subtitle, subtitle, room)
    draw.text((_MARGIN, _MARGIN + 28), text, _QUIET, subtitle)


def _fit(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    room: int,
) -> str:
    """`text` on one line, cut with an ellipsis where it is wider than `room` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= room:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if draw.textlength(text[:middle].rstrip() + "...", font=font) <= room:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."


def _label(draw: ImageDraw.ImageDraw, left: int, top: int, text: str) -> None:
    draw.text((left, top + 4), text, _QUIET, _font(15))


def _views(sheet: Image.Image, views: Sequence[np.ndarray], box: tuple[int, int, int, int]) -> None:
    """Up to four views inside box (left, top, width, height), whole and centred."""
    left, top, width, height = box
    sheet.paste(_PANEL, (left, top, left + width, top + height))
    chosen = [views[i] for i in np.unique(np.linspace(0, len(views) - 1, 4).round().astype(int))]
    columns, rows = {1: (1, 1), 2: (1, 2)}.get(len(chosen), (2, 2))
    cell = (width - (columns - 1) * _GAP) // columns, (height - (rows - 1) * _GAP) // rows
    for index, view in enumerate(chosen):
        picture = Image.fromarray(view)
        scale = min(cell[0] / picture.width, cell[1] / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        x = left + (index % columns) * (cell[0] + _GAP) + (cell[0] - size[0]) // 2
        y = top + (index // columns) * (cell[1] + _GAP) + (cell[1] - size[1]) // 2
        sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y))


def _cloud(
    content: PreviewContent, yaw: float, pitch: float, width: int, height: int
) -> Image.Image:
    keep = np.isfinite(content.points).all(axis=1)
    points, colors = content.points[keep], content.colors[keep]
    step = max(1, len(points) // MAX_POINTS)
    points, colors = points[::step], colors[::step]
    if not len(points):
        empty = Image.new("RGB", (width, height), _PANEL)
        ImageDraw.Draw(empty).text((16, 14), "no points passed the mask", _QUIET, _font(16))
        return empty
    known = content.extrinsics[np.isfinite(content.extrinsics).all(axis=(1, 2))]
    reference = known[0] if len(known) else np.eye(4)
    # Rendered at twice the size and reduced: smooth edges from hard squares.
    view = orbit(points, reference, yaw=yaw, pitch=pitch, width=2 * width, height=2 * height)
    picture = Image.fromarray(render(points, colors, view, _PANEL))
    if len(known):
        _camera_path(ImageDraw.Draw(picture), known, view)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _camera_path(draw: ImageDraw.ImageDraw, extrinsics: np.ndarray, view: Viewpoint) -> None:
    """The camera centres as a line with a dot at the first."""
    rotations, shifts = extrinsics[:, :3, :3], extrinsics[:, :3, 3]
    centres = -np.einsum("fji,fj->fi", rotations, shifts)
    pixels, depth = view.project(centres)
    if not np.isfinite(pixels).all() or depth.min() <= 0 or np.abs(pixels).max() > 1e5:
        return  # the path lies behind this view, there is nothing to draw
    line = [(float(x), float(y)) for x, y in pixels]
    if len(line) > 1:
        draw.line(line, fill=_ACCENT, width=4, joint="curve")
    x, y = line[0]
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=_ACCENT)
