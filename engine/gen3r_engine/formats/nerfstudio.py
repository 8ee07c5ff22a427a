"""transforms.json as nerfstudio reads it: camera to world with OpenGL axes, beside images/.

nerfstudio's cameras look along -z with y up, a scene's along z with y down: the second and third
columns of the pose change sign. The world stays as it is, so that pcds.ply fits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gen3r_engine.formats.cameras import PIXEL_CENTRE, FrameCameras
from gen3r_engine.formats.frames import frame_name

_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def transforms(
    cameras: FrameCameras, height: int, width: int, *, images: str, cloud: str | None
) -> dict[str, Any]:
    """The content of transforms.json.

    Parameters
    ----------
    images : folder of the frames, relative to the file.
    cloud : the PLY file, relative too; None leaves it out.
    """
    frames = []
    for camera, frame in enumerate(cameras.frames):
        pose = np.eye(4)
        pose[:3, :3] = cameras.rotations[camera].T
        pose[:3, 3] = cameras.positions[camera]
        focal, centre = cameras.focal[camera], cameras.centre[camera] + PIXEL_CENTRE
        frames.append(
            {
                "file_path": f"{images}/{frame_name(int(frame))}",
                "fl_x": float(focal[0]),
                "fl_y": float(focal[1]),
                "cx": float(centre[0]),
                "cy": float(centre[1]),
                "w": width,
                "h": height,
                "transform_matrix": (pose @ _OPENGL).tolist(),
            }
        )
    lens: dict[str, Any] = {"camera_model": "OPENCV", "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0}
    return lens | ({} if cloud is None else {"ply_file_path": cloud}) | {"frames": frames}


def write_transforms(path: Path, content: dict[str, Any]) -> None:
    """Write transforms.json. Raises OSError, or ValueError for NaN or infinity in it."""
    text = json.dumps(content, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
