"""Data sets of procedural scenes on disk: packed shards, folders in the layout of training, both.

Folders hold what any training of this project reads (`gen3r_training.data`): train/ and val/ with
PNG frames, cameras, the caption and exact depth. Shards are what training with all clips in memory
reads (`load_clips`); they know the parts and object ids too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gen3r_training.formats.prepare import PrepareOptions, prepare_scenes
from gen3r_training.formats.scene import BadScene, DepthMaps, Frame, Scene, SceneEntry
from gen3r_training.procedural.clips import Clips
from gen3r_training.procedural.make import make_clips
from gen3r_training.procedural.storage import (
    Recipe,
    ShardWriter,
    clips_in_shard,
    read_recipe,
    shard_paths,
    writing_shards,
)

FORMS = ("packed", "folders", "both")
FOLDER_OF = {"train": "train", "held_out": "val"}
_BATCH = {"cpu": 4, "cuda": 512}  # clips rendered at once


@dataclass(frozen=True)
class ProceduralOptions:
    """What is written to `destination`.

    scenes, held_out : clips of the two splits, numbers 0, 1, ... of `seed`
    form : one of `FORMS`; workers : threads that write PNG files

    Raises
    ------
    ValueError : a value out of range.
    """

    destination: Path
    scenes: int
    held_out: int = 0
    seed: int = 0
    frames: int = 17
    size: int = 112
    supersample: int = 2
    form: str = "packed"
    device: str = "cpu"
    workers: int = 4
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form '{self.form}' is unknown; use one of {', '.join(FORMS)}")
        least = {"scenes": 0, "held_out": 0, "seed": 0, "frames": 1, "size": 8, "workers": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} {getattr(self, name)} is below {value}")
        if not self.scenes + self.held_out:
            raise ValueError("scenes and held_out are both 0; ask for at least one scene")

    def recipe(self, split: str) -> Recipe:
        """What one split's packed clips are a function of."""
        count = self.scenes if split == "train" else self.held_out
        return {
            **{"clips": count, "seed": self.seed, "frames": self.frames, "size": self.size},
            "supersample": self.supersample,
        }


@dataclass
class ProceduralReport:
    """rendered : clips by split; existing : clips that were there; seconds : of the rendering."""

    rendered: dict[str, int] = field(default_factory=dict)
    existing: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    total_seconds: float = 0.0


def prepare_procedural(
    options: ProceduralOptions,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> ProceduralReport:
    """Render and write both splits; what is there already is left as it is.

    progress : called with (stage, done, total)

    Raises
    ------
    ValueError : packed clips of another recipe are there and `overwrite` is off.
    OSError : the destination cannot be written.
    """
    started = time.perf_counter()
    report = ProceduralReport()
    counts = {"train": options.scenes, "held_out": options.held_out}
    jobs = [_Split(options, split, count, progress) for split, count in counts.items() if count]
    for job in jobs:  # refuse before anything is rendered
        job.check()
    for job in jobs:
        job.run(report)
    report.total_seconds = time.perf_counter() - started
    return report


@dataclass
class _Split:
    options: ProceduralOptions
    split: str
    count: int
    progress: Callable[[str, int, int], None]

    def check(self) -> None:
        options = self.options
        if options.form == "folders" or options.overwrite:
            return
        there = read_recipe(options.destination, self.split)
        if there is not None and there != options.recipe(self.split):
            raise ValueError(
                f"{shard_paths(options.destination, self.split)[0]} was made from {dict(there)}, "
                f"not {dict(options.recipe(self.split))}; use --overwrite or another DST"
            )

    def run(self, report: ProceduralReport) -> None:
        options = self.options
        packed = options.form != "folders" and (
            options.overwrite or not shard_paths(options.destination, self.split)
        )
        numbers = list(range(self.count))
        if not packed:
            numbers = [n for n in numbers if options.form != "packed" and self._lacks_folder(n)]
        report.rendered[self.split] = len(numbers)
        report.existing[self.split] = self.count - len(numbers)
        if not numbers:
            return
        if not packed:
            for clips, some in self._batches(numbers, report):
                self._write_folders(clips, some)
            return
        recipe = options.recipe(self.split)
        with writing_shards(options.destination, self.split, recipe) as writer:
            self._pack(writer, numbers, report)

    def _pack(self, writer: ShardWriter, numbers: list[int], report: ProceduralReport) -> None:
        step = clips_in_shard(self.options.frames, self.options.size)
        waiting: list[Clips] = []
        for clips, some in self._batches(numbers, report, step):
            if self.options.form == "both":
                self._write_folders(clips, some)
            waiting.append(clips)
            if sum(map(len, waiting)) >= step:
                writer.add(Clips.cat(waiting))
                waiting = []
        if waiting:
            writer.add(Clips.cat(waiting))

    def _batches(
        self, numbers: list[int], report: ProceduralReport, limit: int | None = None
    ) -> Iterator[tuple[Clips, list[int]]]:
        """Rendered clips on the CPU with their numbers; `limit` numbers end a batch."""
        options = self.options
        device = torch.device(options.device)
        groups = [
            numbers[i : i + (limit or len(numbers))]
            for i in range(0, len(numbers), limit or len(numbers))
        ]
        done = 0
        stage = f"render {self.split}"
        self.progress(stage, 0, len(numbers))
        for group in groups:
            for start in range(0, len(group), _BATCH[device.type]):
                some = group[start : start + _BATCH[device.type]]
                before = time.perf_counter()
                clips = make_clips(
                    some,
                    seed=options.seed,
                    split=self.split,
                    frames=options.frames,
                    size=options.size,
                    device=device,
                    supersample=options.supersample,
                ).to("cpu")
                report.seconds += time.perf_counter() - before
                yield clips, some
                done += len(some)
                self.progress(stage, done, len(numbers))

    def _name(self, number: int) -> str:
        o = self.options
        return f"{self.split}_seed{o.seed}_{o.frames}x{o.size}_{number:06d}"

    def _lacks_folder(self, number: int) -> bool:
        folder = self.options.destination / FOLDER_OF[self.split] / self._name(number)
        return self.options.overwrite or not folder.exists()

    def _write_folders(self, clips: Clips, numbers: list[int]) -> None:
        names = [self._name(number) for number in numbers]
        entries = [
            SceneEntry(name, lambda i=i: clip_scene(clips, i))  # type: ignore[misc]
            for i, name in enumerate(names)
        ]
        options = PrepareOptions(
            self.options.destination,
            split=FOLDER_OF[self.split],
            workers=self.options.workers,
            overwrite=self.options.overwrite,
            captions={name: (text,) for name, text in zip(names, clips.captions, strict=True)},
        )
        report = prepare_scenes(entries, options)
        if report.skipped:
            name, reason = next(iter(report.skipped.items()))
            raise ValueError(f"{name} cannot be written: {reason}")


@dataclass(frozen=True)
class _ClipFrames:
    """The pictures of one clip as PNG files (`FrameSource`)."""

    rgb: np.ndarray  # uint8 [F, H, W, 3]

    def __len__(self) -> int:
        return len(self.rgb)

    def __iter__(self) -> Iterator[Frame]:
        for index, pixels in enumerate(self.rgb):
            image = Image.fromarray(pixels)
            data = BytesIO()
            image.save(data, "PNG", compress_level=1)
            yield Frame(image, Path(f"{index:06d}.png"), data.getvalue())

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.rgb.shape[2], self.rgb.shape[1]


def clip_scene(clips: Clips, index: int) -> Scene:
    """One clip as a scene of `gen3r_training.formats`, in scene units."""
    if not 0 <= index < len(clips):
        raise BadScene(f"clip {index} of {len(clips)}")
    depth = clips.depth[index].float().cpu().numpy()
    intrinsics = clips.intrinsics[index].double().cpu().numpy()
    return Scene(
        frames=_ClipFrames(clips.rgb[index].cpu().numpy()),
        extrinsics=torch.linalg.inv(clips.c2w[index].double()).cpu().numpy(),
        intrinsics=np.repeat(intrinsics[None], len(depth), axis=0),
        depth=DepthMaps(lambda frame: depth[frame]),
    )
