"""Data sets of the layout (`gen3r_training.data.layout`): opened and checked once, read by ticket.

A clip takes every n-th frame of a scene, n drawn from 1..max_stride, from a start that is drawn so
that the clip fits; a scene too short for the stride gives every frame, one too short for the clip
repeats its last frame. Frames are resized to cover the square and centre-cropped, and so are the
intrinsics; poses are relative to the clip's first frame. Frames that cannot be read are left out
and the last one is repeated in their stead.

    dataset = open_dataset([Path("data")], "train", num_frames=49, resolution=560, max_stride=2)
    order = SampleOrder(dataset.counts, (), seed=42)
    sample = dataset.fetch(order.ticket(0))
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from gen3r.cameras import crop_intrinsics, invert_pose, relative_poses
from gen3r_training.data.cache_files import DamagedEntry
from gen3r_training.data.captions import clean_prompt
from gen3r_training.data.latent_cache import LatentCache, NotCached, open_cache
from gen3r_training.data.layout import SceneFolder, read_scene, scene_paths
from gen3r_training.data.sampler import permutation
from gen3r_training.data.samples import Notice, Sample, Ticket, derive_seed
from gen3r_training.data.scenes import Clip, frame_indices, load_frames

RESOLUTION_STEP = 56  # pixels: VGGT's patches of 14, the VAE's stride of 8
MOST_REPLACEMENTS = 100  # scenes tried in the place of one that cannot be used
SHOWN = 3  # reasons in one message


def roots_with(roots: Sequence[Path], split: str) -> tuple[Path, ...]:
    """Those of the data roots that have a folder for the split."""
    return tuple(root for root in roots if (root / split).is_dir())


def open_dataset(
    roots: Sequence[Path],
    split: str,
    *,
    num_frames: int,
    resolution: int,
    max_stride: int,
    latent_cache: Path | LatentCache | None = None,
    cached_tokens: bool = False,
    skip_bad_scenes: bool = False,
) -> SceneDataset:
    """List and check every scene of ``ROOT/SPLIT``; no frame is decoded.

    Parameters
    ----------
    num_frames : of a clip, 4k + 1. resolution : pixels of its sides, a multiple of 56.
    max_stride : the largest step between a clip's frames.
    latent_cache : a folder of ``gen3r-engine prepare latents`` made for these three numbers.
    cached_tokens : samples carry VGGT's token maps from the cache too, which stage 2 does not need.
    skip_bad_scenes : leave out scenes that do not fit the layout (`SceneDataset.skipped`).

    Raises
    ------
    ValueError : in one line: a number outside its limits, no roots, a root without the split or
        without scenes, a cache of other clips, a scene that does not fit the layout (unless
        skipped), a data set of which no scene is left.
    """
    check_clip(num_frames, resolution, max_stride)
    if not roots:
        raise ValueError("--data_root: give at least one folder")
    cache = open_cache(latent_cache) if isinstance(latent_cache, Path) else latent_cache
    if cache is not None:
        cache.check_clips(num_frames, resolution, max_stride)
        if cached_tokens and not cache.recipe.tokens:
            raise ValueError(f"the latent cache {cache.folder} was made without --tokens")
    scenes: list[tuple[Path, ...]] = []
    skipped: dict[str, str] = {}
    for root in roots:
        good, bad = _check_scenes(scene_paths(root, split))
        if bad and (not good or not skip_bad_scenes):
            raise ValueError(_bad_scenes(root, split, len(good), bad))
        scenes.append(tuple(good))
        skipped |= {scene_name(path): reason for path, reason in bad.items()}
    return SceneDataset(
        tuple(scenes),
        num_frames,
        resolution,
        max_stride,
        skipped=skipped,
        cache=cache,
        cached_tokens=cached_tokens,
    )


def check_clip(num_frames: int, resolution: int, max_stride: int) -> None:
    """ValueError where a clip cannot have these numbers; the message names the flag."""
    if num_frames < 1 or num_frames % 4 != 1:
        low = max(1, num_frames - (num_frames - 1) % 4)
        raise ValueError(
            f"--num_frames {num_frames}: clips have 4k + 1 frames; use {low} or {low + 4}"
        )
    if resolution < RESOLUTION_STEP or resolution % RESOLUTION_STEP:
        near = max(RESOLUTION_STEP, round(resolution / RESOLUTION_STEP) * RESOLUTION_STEP)
        raise ValueError(
            f"--resolution {resolution} is not a multiple of {RESOLUTION_STEP}; use {near}"
        )
    if max_stride < 1:
        raise ValueError(f"--max_stride {max_stride} must be at least 1")


def _check_scenes(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    good, bad = [], {}
    for path in paths:
        try:
            read_scene(path)
        except (ValueError, OSError) as error:
            bad[path] = str(error)
        else:
            good.append(path)
    return good, bad


def _bad_scenes(root: Path, split: str, good: int, bad: dict[Path, str]) -> str:
    reasons = "; ".join(islice(bad.values(), SHOWN if not good else 1))
    if not good:
        return (
            f"--data_root {root}: none of the {len(bad)} scenes of '{split}' is usable: {reasons}"
        )
    others = f" ({len(bad) - 1} more bad scenes)" if len(bad) > 1 else ""
    return f"{reasons}{others}; mend or remove it, or leave such scenes out with --skip_bad_scenes"


def scene_name(path: Path) -> str:
    """ROOT/SPLIT/SCENE of a scene's folder, without what is above the root."""
    return "/".join(path.absolute().parts[-3:])


def choose_frames(total: int, num_frames: int, max_stride: int, seed: int) -> list[int]:
    """Which frames of a scene of `total` make up the clip of this seed; see the module."""
    rng = random.Random(seed)
    return frame_indices(total, num_frames, rng.randint(1, max_stride), rng=rng)


def draw_caption(captions: Sequence[str], seed: int) -> str:
    """One of a scene's captions, cleaned; empty where it has none."""
    rng = random.Random(seed)
    return clean_prompt(rng.choice(captions), rng.random) if captions else ""


def read_clip(scene: SceneFolder, indices: Sequence[int], size: int) -> Clip:
    """Frames and cameras of a clip of size x size.

    Raises
    ------
    ValueError : none of the frames can be read.
    """
    distinct = list(dict.fromkeys(indices))  # a repeated last frame is read once
    paths = scene.frame_paths(distinct)
    pixels, bad = load_frames(paths, size, size)
    kept = [place for place in range(len(distinct)) if place not in bad]
    order = [min(place, len(kept) - 1) for place in range(len(indices))]
    rows = [distinct[kept[place]] for place in order]
    c2w = relative_poses(invert_pose(scene.extrinsics[rows])).float()
    crops = [_crop(scene, distinct[place], paths[place], size) for place in kept]
    return Clip(
        pixels[order] / 255,
        c2w,
        torch.stack(crops)[order],
        tuple(scene.frames[row] for row in rows),
        tuple(paths[place].name for place in bad),
    )


def _crop(scene: SceneFolder, row: int, path: Path, size: int) -> torch.Tensor:  # [3, 3]
    with Image.open(path) as image:  # its header alone
        width, height = image.size
    k = scene.intrinsics[row]
    focal, center = (float(k[0, 0]), float(k[1, 1])), (float(k[0, 2]), float(k[1, 2]))
    return crop_intrinsics((height, width), focal, center, size)


class SceneDataset:
    """Scenes of one or more data sets; see `open_dataset`.

    scenes : the folders of every data set's usable scenes, by name
    skipped : scene -> why it was left out when the data sets were opened
    cache : latents of their clips, or None; cached_tokens : whether their token maps are read
    """

    def __init__(
        self,
        scenes: tuple[tuple[Path, ...], ...],
        num_frames: int,
        resolution: int,
        max_stride: int,
        *,
        skipped: dict[str, str],
        cache: LatentCache | None = None,
        cached_tokens: bool = False,
    ) -> None:
        self.scenes = scenes
        self.num_frames = num_frames
        self.resolution = resolution
        self.max_stride = max_stride
        self.skipped = skipped
        self.cache = cache
        self.cached_tokens = cached_tokens
        self._told: set[tuple[str, str]] = set()

    @property
    def counts(self) -> tuple[int, ...]:
        """Usable scenes of every data set."""
        return tuple(len(paths) for paths in self.scenes)

    def fetch(self, ticket: Ticket) -> Sample:
        """The sample of a ticket; what is amiss with a scene is a warning, once.

        Errors as `fetch_noticed`.
        """
        sample, notices = self.fetch_noticed(ticket)
        for notice in notices:
            if (notice.kind, notice.scene) not in self._told:
                self._told.add((notice.kind, notice.scene))
                warnings.warn(str(notice), stacklevel=2)
        return sample

    def fetch_noticed(self, ticket: Ticket) -> tuple[Sample, tuple[Notice, ...]]:
        """The sample of a ticket and what should be told of the scenes that were read for it.

        A scene that cannot be used is replaced by another one of its data set. Which one depends on
        the ticket and on the files alone, never on what was read before.

        Raises
        ------
        ValueError : neither the scene nor its replacements can be used.
        RuntimeError : anything unforeseen, with the scene's name.
        """
        notices: list[Notice] = []
        for path in self._candidates(ticket):
            name = scene_name(path)
            try:
                sample, found = self._read(path, ticket)
            except (ValueError, OSError) as error:
                reason = f"{error}; another scene takes its place"
                notices.append(Notice("replaced", name, reason))
            except Exception as error:
                raise RuntimeError(
                    f"scene {name} (sample {ticket.index}): {type(error).__name__}: {error}"
                ) from error
            else:
                return sample, (*notices, *found)
        raise ValueError(
            f"sample {ticket.index}: none of {len(notices)} scenes can be used any more; "
            f"the first: {notices[0]}"
        )

    def _candidates(self, ticket: Ticket) -> Iterator[Path]:
        paths = self.scenes[ticket.dataset]
        yield paths[ticket.scene]
        others = permutation(len(paths), derive_seed(ticket.seed, "replacement"))
        yield from (paths[i] for i in others[:MOST_REPLACEMENTS] if i != ticket.scene)

    def _read(self, path: Path, ticket: Ticket) -> tuple[Sample, list[Notice]]:
        scene = read_scene(path)
        name = scene_name(path)
        prompt = draw_caption(scene.captions, derive_seed(ticket.seed, "caption"))
        indices = choose_frames(
            len(scene.frames), self.num_frames, self.max_stride, self._clip_seed(path, ticket)
        )
        notices: list[Notice] = []
        if self.cache is not None:
            try:
                return self._stored(self.cache, scene, indices, prompt, ticket)
            except NotCached as error:
                notices.append(Notice("cache", name, f"{error}; its frames are encoded anew"))
        clip = read_clip(scene, indices, self.resolution)
        if clip.unreadable:
            shown = ", ".join(clip.unreadable[:SHOWN])
            reason = f"{len(clip.unreadable)} unreadable frames are left out ({shown})"
            notices.append(Notice("frames", name, reason))
        sample = Sample(
            clip.frames, clip.c2w, clip.intrinsics, prompt, name, ticket.seed, ticket.index
        )
        return sample, notices

    def _clip_seed(self, path: Path, ticket: Ticket) -> int:
        """Any clip of the scene, or one of those that the cache is made of."""
        if self.cache is None:
            return derive_seed(ticket.seed, "clip")
        recipe = self.cache.recipe
        return recipe.clip_seed(
            path.name, derive_seed(ticket.seed, "cached") % recipe.clips_per_scene
        )

    def _stored(
        self,
        cache: LatentCache,
        scene: SceneFolder,
        indices: Sequence[int],
        prompt: str,
        ticket: Ticket,
    ) -> tuple[Sample, list[Notice]]:
        stored = cache.clip(scene, indices, tokens=self.cached_tokens)
        name = scene_name(scene.path)
        notices: list[Notice] = []
        try:
            text = cache.text(prompt)
        except DamagedEntry as error:
            text = None
            notices.append(Notice("cache", name, f"{error}; its prompt is encoded anew"))
        sample = Sample(
            torch.empty(0, 3, self.resolution, self.resolution),
            stored.c2w,
            stored.intrinsics,
            prompt,
            name,
            ticket.seed,
            ticket.index,
            replace(stored.latents, text=text),
        )
        return sample, notices
