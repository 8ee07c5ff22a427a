"""A contact sheet: clips as rows of frames under each other, each with a label, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLUMNS = 6  # frames of a clip that are shown
LABEL, GAP = 104, 2  # pixels


@dataclass(frozen=True)
class Row:
    """One clip: frames uint8 [F, H, W, 3]."""

    label: str
    frames: np.ndarray


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """The rows as one picture, up to `COLUMNS` frames each, evenly spaced from first to last.

    Raises
    ------
    ValueError : no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    count = min(COLUMNS, max(len(row.frames) for row in rows))
    height, width = (max(row.frames.shape[i] for row in rows) for i in (1, 2))
    size = LABEL + count * (width + GAP), len(rows) * (height + GAP)
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = index * (height + GAP)
        draw.text((4, top + 4), row.label, fill=(0, 0, 0))
        chosen = np.linspace(0, len(row.frames) - 1, count).round().astype(int)
        for column, frame in enumerate(chosen):
            picture = Image.fromarray(np.ascontiguousarray(row.frames[frame]))
            sheet.paste(picture, (LABEL + column * (width + GAP), top))
    return sheet
