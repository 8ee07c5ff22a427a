"""A scene as one binary glTF 2.0 file (.glb): coloured points, and camera frusta as lines.

glTF is right-handed with y up and looks along -z: the root node turns a scene's axes (y down, z
ahead) by half a turn about x. COLOR_0 is linear light in glTF, so sRGB bytes become linear values:
viewers that follow the standard then show the colours of the frames. They are float32, for 8 linear
bits are too few in the dark, and trimesh misreads 16. Both materials are unlit
(KHR_materials_unlit): the colours already hold the light.

The binary chunk holds, all [N, 3] float32: positions; normals, when given; colours; then the ends
of the frusta's lines, [C * 16, 3].
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gen3r_engine.formats.cameras import (
    FrameCameras,
    frustum_corners,
    frustum_lines,
    frustum_size,
)
from gen3r_engine.fusion import PointCloud
from gen3r_engine.native import native

_FLOAT = 5126
_POINTS, _LINES = 0, 1
_ARRAY_BUFFER = 34962
_TRIPLE = 12  # bytes of three float32
_LARGEST = 2**32 - 1  # a glb counts its bytes in 32 bits
_FRUSTUM_COLOR = [1.0, 0.35, 0.08, 1.0]
_FROM_OPENCV = [1, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]


def linear_light() -> NDArray[np.float32]:
    """[256] the linear value in [0, 1] of every sRGB byte."""
    s = np.arange(256) / 255.0
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


class _Buffer:
    """What the JSON says about the parts of the binary chunk, all of them [N, 3] float32."""

    def __init__(self) -> None:
        self.length = 0
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, count: int, **more: Any) -> int:
        """Plan the next part; the index of its accessor."""
        view = {"buffer": 0, "byteOffset": self.length, "byteLength": count * _TRIPLE}
        self.views.append(view | {"target": _ARRAY_BUFFER})
        where = {"bufferView": len(self.views) - 1, "type": "VEC3"}
        self.accessors.append({**where, "componentType": _FLOAT, "count": count, **more})
        self.length += count * _TRIPLE
        return len(self.accessors) - 1


def write_glb(
    path: str | Path,
    cloud: PointCloud,
    cameras: FrameCameras,
    height: int,
    width: int,
) -> None:
    """Write the cloud and the frusta. An empty cloud leaves the frusta, or a scene of nothing.

    Parameters
    ----------
    height, width : pixels of the frames that the cameras see.

    Raises
    ------
    ValueError : more than 4 GiB, which a glb cannot hold, or a point that float32 cannot hold.
    OSError : the file cannot be written.
    """
    buffer = _Buffer()
    meshes: dict[str, dict[str, Any]] = {}
    points, colors = np.ascontiguousarray(cloud.points), np.ascontiguousarray(cloud.colors)
    normals = None
    if len(points):
        low, high = _bounds(points)
        attributes = {"POSITION": buffer.add(len(points), min=low, max=high)}
        if cloud.normals is not None:
            normals = np.array(cloud.normals, dtype=np.float32)
            # glTF takes unit vectors only; where a normal is unknown, one towards the first camera.
            normals[~normals.any(axis=1)] = (0.0, 0.0, -1.0)
            attributes["NORMAL"] = buffer.add(len(points))
        attributes["COLOR_0"] = buffer.add(len(points))
        meshes["points"] = _mesh(attributes, _POINTS, material=0)
    lines = frustum_lines(frustum_corners(cameras, height, width, frustum_size(points)))
    ends = lines.reshape(-1, 3).astype("<f4")
    if len(ends):
        low, high = _bounds(ends)
        place = buffer.add(len(ends), min=low, max=high)
        meshes["cameras"] = _mesh({"POSITION": place}, _LINES, material=1)
    header = _header(_document(buffer, meshes), buffer.length)
    with open(path, "wb") as file:
        file.write(header)
        if len(points):
            _write_points(file, points, colors, normals)
        file.write(ends.data)


def _bounds(points: NDArray[Any]) -> tuple[list[float], list[float]]:
    """Least and greatest corner after rounding to float32. ValueError when they are not finite."""
    low, high = (corner.astype(np.float32) for corner in (points.min(axis=0), points.max(axis=0)))
    if not np.isfinite([low, high]).all():
        raise ValueError("a point is not finite as float32; drop such points or use larger units")
    return low.tolist(), high.tolist()


def _write_points(
    file: BinaryIO,
    points: NDArray[np.float64],
    colors: NDArray[np.uint8],
    normals: NDArray[np.float32] | None,
) -> None:
    """Positions, normals and colours, one after the other; in C++ where that is built."""
    module: Any = native()
    if module is not None:
        file.flush()  # it writes to the descriptor
        module.glb_points(file.fileno(), points, colors, normals, linear_light(), str(file.name))
        return
    parts = [points.astype("<f4"), normals, linear_light().astype("<f4")[colors]]
    for part in parts:
        if part is not None:
            file.write(part.data)


def _mesh(attributes: dict[str, int], mode: int, material: int) -> dict[str, Any]:
    return {"primitives": [{"attributes": attributes, "mode": mode, "material": material}]}


def _document(buffer: _Buffer, meshes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON chunk. glTF forbids empty lists, so what is empty is left out."""
    unlit: dict[str, Any] = {"extensions": {"KHR_materials_unlit": {}}}
    frusta = {"pbrMetallicRoughness": {"baseColorFactor": _FRUSTUM_COLOR}, "name": "cameras"}
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "gen3r-engine"},
        "scene": 0,
        "scenes": [{"name": "scene", "nodes": [0]}],
        "nodes": [{"name": "world", "matrix": _FROM_OPENCV}],
    }
    if not meshes:
        return document
    document["nodes"][0]["children"] = [i + 1 for i in range(len(meshes))]
    document["nodes"] += [{"name": name, "mesh": i} for i, name in enumerate(meshes)]
    return document | {
        "extensionsUsed": ["KHR_materials_unlit"],
        "meshes": [{"name": name, **mesh} for name, mesh in meshes.items()],
        "materials": [{"name": "points", **unlit}, {**frusta, **unlit}],
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": buffer.length}],
    }


def _header(document: dict[str, Any], length: int) -> bytes:
    """Everything before the binary chunk's bytes, of which there are `length`."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("utf-8")
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + (8 + length if length else 0)
    if total > _LARGEST:
        raise ValueError(
            f"a cloud of {total} bytes does not fit a .glb (4 GiB at most); "
            "use larger voxels or pcds.ply"
        )
    binary = struct.pack("<I4s", length, b"BIN\0") if length else b""
    head = struct.pack("<4sII", b"glTF", 2, total) + struct.pack("<I4s", len(text), b"JSON")
    return head + text + binary
