"""What ``gen3r-engine prepare latents`` is asked to do, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from gen3r_training.data.dataset import check_clip
from gen3r_training.data.latent_cache import DTYPES
from gen3r_training.data.layout import SPLITS

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class LatentCacheConfig:
    """What to encode and where to put it. One cache folder serves one recipe (`Recipe`).

    Parameters
    ----------
    data_root, split, num_frames, resolution, max_stride, skip_bad_scenes : as `open_dataset`.
    pretrained_path : pipeline folder or hub id that holds the encoders.
    geo_adapter : another adapter than the pipeline's: its folder or weight file.
    cache_dir : the cache; made when it is not there.
    clips_per_scene : clips of every scene, drawn once; training draws among them.
    seed : of these draws, independent of a training run's.
    dtype : ``float32`` or ``bfloat16``; training must compute its frozen modules in the same.
    tokens : store VGGT's token maps too (1.6 GB for 49 frames at 560 px in bfloat16).
    upstream_control_geometry : encode the geometry of the control videos as well.
    num_workers : threads that read frames ahead, 0 for none.

    Raises
    ------
    ValueError : a value outside its limits; the text begins with the flag.
    """

    data_root: tuple[Path, ...]
    pretrained_path: str | Path
    cache_dir: Path
    geo_adapter: Path | None = None
    split: str = "train"
    num_frames: int = 49
    resolution: int = 560
    max_stride: int = 2
    clips_per_scene: int = 4
    seed: int = 42
    device: str = "auto"
    dtype: str = "bfloat16"
    tokens: bool = False
    upstream_control_geometry: bool = False
    skip_bad_scenes: bool = False
    num_workers: int = 2

    def __post_init__(self) -> None:
        if not self.data_root:
            raise ValueError("--data_root: give at least one folder")
        check_clip(self.num_frames, self.resolution, self.max_stride)
        for flag, value, known in (
            ("split", self.split, SPLITS),
            ("device", self.device, DEVICES),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in known:
                raise ValueError(f"--{flag} '{value}' is unknown; known: {', '.join(known)}")
        if self.clips_per_scene < 1:
            raise ValueError(f"--clips_per_scene {self.clips_per_scene} must be at least 1")
        for flag, number in (("seed", self.seed), ("num_workers", self.num_workers)):
            if number < 0:
                raise ValueError(f"--{flag} {number} must not be negative")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no CUDA GPU here; use --device cpu")

    @property
    def torch_device(self) -> torch.device:
        """Where the encoders run."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass(frozen=True)
class CacheReport:
    """What `encode_dataset` did.

    encoded, reused : clips that were encoded now, and that were there and sound.
    failed : scene -> why a clip of it could not be encoded.
    damaged : entry's file -> what was wrong with it; it is encoded anew.
    unreadable : scene -> how many frames of its clips were left out since they cannot be read.
    prompts : encoded now. skipped : scene -> why it was left out (`skip_bad_scenes`).
    """

    encoded: int
    reused: int
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    prompts: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
