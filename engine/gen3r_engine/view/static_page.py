"""One self-contained HTML page that shows a scene: no server, no network, data inside the file.

Points are 10 bytes each, in base64: x, y, z as uint16 steps of the cloud's box, red, green, blue,
and the percentage of points that are less sure. A million points make a page of 13 MB.
"""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen3r_engine.formats.cameras import FRUSTUM_EDGES, frustum_corners
from gen3r_engine.view.scene_view import SceneView

_FULL = 65535
_THUMBNAIL = 256  # longest side of a frame inside the page, pixels
_RECORD = np.dtype([("place", "<u2", 3), ("color", "u1", 3), ("sureness", "u1")])


def static_page(view: SceneView) -> bytes:
    """The page, UTF-8."""
    low, extent = _box(view.points)
    records = np.zeros(len(view.points), _RECORD)
    records["place"] = np.rint((view.points - low) / extent * _FULL).clip(0, _FULL)
    records["color"] = view.colors
    records["sureness"] = 100 if view.sureness is None else view.sureness
    target, distance = first_look(view)
    scene = {
        "count": len(records),
        "frames": view.count,
        "starts": None if view.starts is None else view.starts.tolist(),
        "sureness": view.sureness is not None,
        "low": low.tolist(),
        "extent": extent.tolist(),
        "target": target,
        "distance": distance,
        "edges": FRUSTUM_EDGES,
        "cameras": _cameras(view),
        "images": _images(view),
        "notes": [f"{text}." for text in (*view.notes, *(f"No {m}" for m in view.missing))],
    }
    folder = resources.files("gen3r_engine.view")
    parts = {
        "title": html.escape(view.title or "Scene"),
        # In a script element only "</" could end the text too early.
        "scene": json.dumps(scene, separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
        "points": base64.b64encode(records.tobytes()).decode("ascii"),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:  # one pass: what is put in may hold braces of its own
        name, rest = piece.split("}}", 1)
        out += [parts[name], rest]
    return "".join(out).encode("utf-8")


def _box(points: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least corner and extent (> 0) of the cloud."""
    if not len(points):
        return np.zeros(3), np.ones(3)
    low = points.min(axis=0).astype(np.float64)
    return low, np.maximum(points.max(axis=0) - low, 1e-9)


def first_look(view: SceneView) -> tuple[list[float], float]:
    """What the page looks at first, and from how far: the cloud's middle, from further back."""
    middle = np.zeros(3)
    if len(view.points):
        middle = np.median(view.points[:: max(1, len(view.points) // 100_000)], axis=0)
    first = np.zeros(3)
    if view.cameras is not None and len(view.cameras):
        first = view.cameras.positions[0]
    distance = 1.35 * float(np.linalg.norm(middle - first)) or 1.0
    return [float(v) for v in middle], distance


def _cameras(view: SceneView) -> list[dict[str, Any]]:
    """Frame, pose, lens and frustum of every camera; rotations by rows, focal in half heights."""
    if view.cameras is None or not len(view.cameras):
        return []
    cameras = view.cameras
    corners = frustum_corners(cameras, view.height, view.width, view.frustum)
    return [
        {
            "frame": int(frame),
            "rotation": np.round(cameras.rotations[i], 7).ravel().tolist(),
            "position": cameras.positions[i].tolist(),
            "focal": float(2.0 * cameras.focal[i, 1] / max(1, view.height)),
            "aspect": view.width / max(1, view.height),
            "corners": np.round(corners[i], 6).tolist(),
        }
        for i, frame in enumerate(cameras.frames)
    ]


def _images(view: SceneView) -> list[str]:
    """Every frame as a small JPEG in base64."""
    found = []
    for frame in () if view.frames is None else view.frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        data = io.BytesIO()
        picture.save(data, format="JPEG", quality=80)
        found.append(base64.b64encode(data.getvalue()).decode("ascii"))
    return found
