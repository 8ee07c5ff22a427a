"""The frames of a scene as numbered PNG images, which COLMAP and nerfstudio refer to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_THREADS = 4  # Pillow compresses outside the GIL


def frame_name(frame: int) -> str:
    """The file name of a frame: frame_00007.png."""
    return f"frame_{frame:05d}.png"


def write_frames(
    folder: Path,
    frames: NDArray[np.uint8] | NDArray[np.uint16],  # [F, H, W, 3] uint8 or [F, H, W] uint16
) -> None:
    """Write every frame as a PNG (RGB of 8 bits, or grey of 16 bits) into a new folder.

    Raises
    ------
    OSError : the folder exists or cannot be written.
    """
    folder.mkdir()

    def write(index: int) -> None:
        # Level 1: twice as fast as the default of 6 at about 5 % more bytes for photographs.
        Image.fromarray(frames[index]).save(folder / frame_name(index), compress_level=1)

    with ThreadPoolExecutor(_THREADS, "gen3r-png") as pool:
        for done in [pool.submit(write, index) for index in range(len(frames))]:
            done.result()
