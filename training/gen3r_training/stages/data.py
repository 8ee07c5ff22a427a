"""What both stages do with data: open the splits, choose validation samples, average logs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from gen3r_training.config import TrainConfig
from gen3r_training.data import Sample, SceneDataset, Ticket, open_dataset, roots_with
from gen3r_training.data.samples import derive_seed


def open_splits(config: TrainConfig) -> tuple[SceneDataset, SceneDataset | None]:
    """The training split, and the validation split where it is asked for.

    Raises
    ------
    ValueError : as `open_dataset`; validation is asked for and no data root has a folder ``val``.
    """

    def split(name: str, cached: bool) -> SceneDataset:
        return open_dataset(
            roots_with(config.data_root, name) if name == "val" else config.data_root,
            name,
            num_frames=config.num_frames,
            resolution=config.resolution,
            max_stride=config.max_stride,
            latent_cache=config.latent_cache if cached else None,
            skip_bad_scenes=config.skip_bad_scenes,
        )

    train = split("train", True)
    if not config.validate_every:
        return train, None
    if not roots_with(config.data_root, "val"):
        raise ValueError(
            f"--validate_every {config.validate_every}: no --data_root has a folder 'val'; make "
            "one, or use --validate_every 0"
        )
    return train, split("val", False)


def validation_samples(dataset: SceneDataset, seed: int, count: int) -> Iterator[Sample]:
    """`count` samples, the same ones every time; the scenes take turns, data set by data set."""
    places = [(d, s) for d, scenes in enumerate(dataset.counts) for s in range(scenes)]
    for index in range(count):
        dataset_index, scene = places[index % len(places)]
        drawn = derive_seed(seed, "validation", index)
        yield dataset.fetch(Ticket(dataset_index, scene, drawn, index))


def chosen_device(config: TrainConfig) -> torch.device:
    """The kind of device that the run will use."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.device == "auto" else config.device)


def frozen_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of modules that are not trained: bf16 in a bf16 run on a GPU, else float32."""
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


def mean_logs(logs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each name over those that have it."""
    names = dict.fromkeys(name for log in logs for name in log)
    found = {name: [log[name] for log in logs if name in log] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in found.items()}
