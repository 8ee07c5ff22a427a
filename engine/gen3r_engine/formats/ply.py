"""A coloured cloud as binary PLY: the C++ writer where it is built, `gen3r.writers` otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gen3r.writers import ply_header, write_ply
from gen3r_engine.fusion import PointCloud
from gen3r_engine.native import native


def write_cloud(path: Path, cloud: PointCloud) -> None:
    """Write points, colours and normals if there are any; the bytes are the same both ways.

    Raises
    ------
    OSError : the file cannot be written.
    """
    module: Any = native()
    if module is None:
        write_ply(path, cloud.points, cloud.colors, cloud.normals)
        return
    normals = None if cloud.normals is None else np.ascontiguousarray(cloud.normals, np.float32)
    points, colors = np.ascontiguousarray(cloud.points), np.ascontiguousarray(cloud.colors)
    with open(path, "wb") as file:
        file.write(ply_header(len(cloud), normals=normals is not None))
        file.flush()  # the rows go to the descriptor
        module.ply_rows(file.fileno(), points, colors, normals, str(path))
