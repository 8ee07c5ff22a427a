"""The latent cache: clips and prompts that ``gen3r-engine prepare latents`` has encoded.

    CACHE/recipe.json       which clips of a scene there are, and what encoded them (`Recipe`)
    CACHE/clips/ab/KEY.safetensors    posteriors, CLIP features, cameras of one clip
    CACHE/tokens/ab/KEY.safetensors   its VGGT token maps, where they were asked for
    CACHE/text/ab/KEY.safetensors     features of one prompt
    CACHE/index/*.jsonl     clip -> KEY

KEY is a hash of everything that an entry depends on: the encoders' weights, the dtype, the contents
of the clip's frames and cameras, which frames they are, their size, the version of this format. An
entry is therefore never wrong, only absent. Training finds an entry without reading frames, by the
scene's cameras, the frames' names and their sizes in bytes; frames that were rewritten at the same
size go unnoticed until ``prepare latents`` runs again, which reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from gen3r.causal_video import Posterior
from gen3r_training.data import cache_files
from gen3r_training.data.cache_files import DamagedEntry, digest, entry_path
from gen3r_training.data.fingerprints import TEXT_MODULES, fingerprints
from gen3r_training.data.layout import SceneFolder
from gen3r_training.data.samples import CachedClip, derive_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AGAIN = "run gen3r-engine prepare latents"


class NotCached(LookupError):
    """A clip that the cache does not hold in a usable form; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What a cache folder holds.

    num_frames, resolution, max_stride : of its clips, as for training.
    clips_per_scene, seed : its clips are numbers 0..clips_per_scene-1 of every scene.
    dtype : ``float32`` or ``bfloat16``, of the encoders and of what is stored.
    text_len : most tokens of a prompt.
    control_geometry : control videos have a geometry half too.
    tokens : VGGT's token maps are there.
    weights : module -> sha256 of its files.
    """

    num_frames: int
    resolution: int
    max_stride: int
    clips_per_scene: int
    seed: int
    dtype: str
    text_len: int
    control_geometry: bool
    tokens: bool
    weights: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The recipe of a cache folder. Errors as `open_cache`."""
        path = folder / "recipe.json"
        if not path.is_file():
            raise ValueError(f"latent cache {folder}: no recipe.json; {AGAIN}")
        values = cache_files.read_json(path)
        version, names = values.pop("format", None), {field.name for field in fields(cls)}
        if version != cache_files.FORMAT or values.keys() != names:
            raise ValueError(
                f"latent cache {folder} has format '{version}', this is "
                f"'{cache_files.FORMAT}'; {AGAIN} with another --cache_dir"
            )
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Put the recipe into a cache folder. Errors: OSError."""
        values = {"format": cache_files.FORMAT, **asdict(self)}
        text = json.dumps(values, indent=2) + "\n"
        cache_files.write_whole(folder / "recipe.json", text.encode())

    def contents(self) -> dict[str, object]:
        """What every entry of a clip depends on."""
        names = ("num_frames", "resolution", "dtype", "control_geometry", "tokens")
        weights = {n: v for n, v in self.weights.items() if n not in TEXT_MODULES}
        return {"weights": weights, **{name: getattr(self, name) for name in names}}

    def clip_seed(self, scene: str, number: int) -> int:
        """Seed of the frames of clip `number` of the scene of this name."""
        return derive_seed("cached clip", self.seed, scene, number)

    def text_key(self, prompt: str) -> str:
        """Key of a prompt's entry."""
        weights = {name: self.weights[name] for name in TEXT_MODULES}
        return digest(cache_files.FORMAT, weights, self.dtype, self.text_len, prompt)


@dataclass(frozen=True)
class StoredClip:
    """An entry: what was encoded, and the cameras of the frames it was encoded from.

    c2w : [F, 4, 4] float32, relative to the first; intrinsics : [F, 3, 3] float32
    """

    latents: CachedClip
    c2w: Tensor
    intrinsics: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in an entry, on the CPU; without text and tokens."""
        clip = self.latents
        posteriors = {"appearance": clip.appearance, "geometry": clip.geometry}
        posteriors |= {f"appearance.{task}": p for task, p in clip.control_appearance.items()}
        posteriors |= {f"geometry.{task}": p for task, p in clip.control_geometry.items()}
        found = {"image": clip.image, "c2w": self.c2w, "intrinsics": self.intrinsics}
        for name, posterior in posteriors.items():
            found |= {f"{name}/mean": posterior.mean, f"{name}/logvar": posterior.logvar}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`. KeyError when one is missing."""
        posteriors = {
            name.removesuffix("/mean"): Posterior(mean, tensors[name[:-4] + "logvar"])
            for name, mean in sorted(tensors.items())
            if name.endswith("/mean")
        }
        control: dict[str, dict[str, Posterior]] = {"appearance": {}, "geometry": {}}
        for name, posterior in posteriors.items():
            half, _, task = name.partition(".")
            if task:
                control[half][task] = posterior
        latents = CachedClip(
            posteriors["appearance"],
            posteriors["geometry"],
            control["appearance"],
            control["geometry"],
            tensors["image"],
        )
        return cls(latents, tensors["c2w"], tensors["intrinsics"])


def clip_id(scene: SceneFolder, indices: Sequence[int]) -> str:
    """By what training finds a clip: scene name, cameras, frame names and sizes, which frames.

    Raises
    ------
    OSError : a frame is gone.
    """
    distinct = list(dict.fromkeys(indices))
    sizes = [path.stat().st_size for path in scene.frame_paths(distinct)]
    names = [scene.frames[i] for i in distinct]
    return digest(scene.path.name, scene.cameras_digest, names, sizes, list(indices))


def open_cache(folder: Path) -> LatentCache:
    """Open a cache folder for reading.

    Raises
    ------
    ValueError : the folder is no latent cache, or one of another version. OSError : unreadable.
    """
    return LatentCache(folder, Recipe.read(folder), cache_files.read_index(folder))


class LatentCache:
    """Encoded clips and prompts of one recipe.

    folder : where they lie; recipe : what they are. ``len(cache)`` is the number of indexed clips.
    """

    def __init__(self, folder: Path, recipe: Recipe, index: dict[str, str]) -> None:
        self.folder = folder
        self.recipe = recipe
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def clip(
        self, scene: SceneFolder, indices: Sequence[int], *, tokens: bool = False
    ) -> StoredClip:
        """The entry of some frames of a scene, without text.

        tokens : read the token maps too (1.6 GB for 49 frames at 560 px in bfloat16).

        Raises
        ------
        NotCached : there is none, the frames' sizes have changed, or the entry is damaged.
        """
        try:
            key = self._index.get(clip_id(scene, indices))
        except OSError as error:
            raise NotCached(f"a frame cannot be found ({error})") from error
        if key is None:
            raise NotCached(f"not in the latent cache {self.folder}, or changed since; {AGAIN}")
        try:
            stored = StoredClip.of(self._read("clips", key))
            if not tokens:
                return stored
            maps = self._read("tokens", key)["tokens"]
            return replace(stored, latents=replace(stored.latents, tokens=maps))
        except (OSError, DamagedEntry, KeyError) as error:
            raise NotCached(f"{error}; {AGAIN}") from error

    def _read(self, kind: str, key: str) -> dict[str, Tensor]:
        return cache_files.read_entry(entry_path(self.folder, kind, key))

    def text(self, prompt: str) -> Tensor | None:
        """Features [n, text_dim] of a prompt, or None where it is not cached.

        Raises
        ------
        DamagedEntry : the entry is not what was written.
        """
        try:
            return self._read("text", self.recipe.text_key(prompt))["text"]
        except FileNotFoundError:
            return None

    def check_clips(self, num_frames: int, resolution: int, max_stride: int) -> None:
        """ValueError where the cache's clips are others than these."""
        asked = {"num_frames": num_frames, "resolution": resolution, "max_stride": max_stride}
        for name, value in asked.items():
            has = getattr(self.recipe, name)
            if has != value:
                raise ValueError(
                    f"--{name} {value}: the latent cache {self.folder} was made with {has}; use "
                    f"that, or {AGAIN} into another --cache_dir"
                )

    def check_weights(
        self,
        places: Mapping[str, Path],
        *,
        dtype: torch.dtype,
        control_geometry: bool = False,
        tokens: bool = False,
    ) -> None:
        """Raise ValueError where the cache was not made by these modules in this dtype.

        Reads the modules' files as a whole (`fingerprints`).

        Parameters
        ----------
        places : module name -> its folder or file; those that are named are compared.
        control_geometry, tokens : whether they are needed.
        """
        recipe, again = self.recipe, f"{AGAIN} into another --cache_dir"
        if DTYPES[recipe.dtype] != dtype:
            wanted = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"latent cache {self.folder} holds {recipe.dtype}, the run computes in {wanted}; "
                f"{again} with --dtype {wanted}"
            )
        for flag, needed, has in (
            ("upstream_control_geometry", control_geometry, recipe.control_geometry),
            ("tokens", tokens, recipe.tokens),
        ):
            if needed and not has:
                raise ValueError(
                    f"latent cache {self.folder} was made without --{flag}; {again} with it"
                )
        for name, found in fingerprints(places, list(places)).items():
            if recipe.weights.get(name) != found:
                raise ValueError(
                    f"latent cache {self.folder} was made with other weights of {name} than "
                    f"{places[name]}; {again}"
                )
