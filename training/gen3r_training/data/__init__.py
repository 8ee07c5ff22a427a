"""Training data: scenes on disk, the order of samples, their stream, and the latent cache.

`open_dataset` checks a data set, `SampleOrder` says which sample comes when, `SampleStream` reads
them ahead. `load_clip`, `read_transforms` and `list_images` read upstream's own layout. What needs
the model's encoders is in `gen3r_training.data.encoding` and `.encode_dataset`, which take seconds
to import.
"""

from gen3r_training.data.cache_files import DamagedEntry
from gen3r_training.data.captions import clean_prompt, possible_prompts
from gen3r_training.data.dataset import SceneDataset, open_dataset, roots_with
from gen3r_training.data.encode_config import CacheReport, LatentCacheConfig
from gen3r_training.data.latent_cache import LatentCache, NotCached, Recipe, open_cache
from gen3r_training.data.layout import SceneFolder, read_scene
from gen3r_training.data.sampler import SampleOrder
from gen3r_training.data.samples import CachedClip, Notice, Sample, Ticket, derive_seed
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
from gen3r_training.data.stream import SampleStream

__all__ = [
    "CacheReport",
    "CachedClip",
    "Clip",
    "DamagedEntry",
    "LatentCache",
    "LatentCacheConfig",
    "NotCached",
    "Notice",
    "Recipe",
    "Sample",
    "SampleOrder",
    "SampleStream",
    "SceneDataset",
    "SceneFolder",
    "SceneFrame",
    "Ticket",
    "clean_prompt",
    "derive_seed",
    "frame_indices",
    "list_images",
    "load_clip",
    "load_frames",
    "open_cache",
    "open_dataset",
    "possible_prompts",
    "read_cameras",
    "read_scene",
    "read_transforms",
    "roots_with",
]
