"""Training data: scenes on disk (frames and cameras) and their captions."""

from gen3r_training.data.captions import clean_prompt
from gen3r_training.data.scenes import (
    Clip,
    SceneFrame,
    frame_indices,
    list_images,
    load_clip,
    load_frames,
    read_cameras,
    read_transforms,
)

__all__ = [
    "Clip",
    "SceneFrame",
    "clean_prompt",
    "frame_indices",
    "list_images",
    "load_clip",
    "load_frames",
    "read_cameras",
    "read_transforms",
]
