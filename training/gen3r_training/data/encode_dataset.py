"""Fill a latent cache: ``gen3r-engine prepare latents``.

Prompts come first (the text encoder alone is more than half of the weights), then clips. What the
cache holds already is verified and kept; several processes may fill one cache at the same time and
share the work, and one that is killed loses only the clip that it was at.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

from gen3r.checkpoint import inspect_place, read_config, resolve_checkpoint
from gen3r.components import COMPONENTS
from gen3r.config import TransformerConfig
from gen3r.folders import check_writable
from gen3r_training.data import cache_files
from gen3r_training.data.cache_files import CacheWriter, DamagedEntry, digest, entry_path
from gen3r_training.data.captions import possible_prompts
from gen3r_training.data.dataset import (
    choose_frames,
    open_dataset,
    read_clip,
    scene_name,
)
from gen3r_training.data.encode_config import CacheReport, LatentCacheConfig
from gen3r_training.data.encoding import (
    ClipEncoders,
    TextEncoder,
    encode_clip,
    encode_prompt,
    load_clip_encoders,
    load_text_encoder,
)
from gen3r_training.data.fingerprints import CLIP_MODULES, TEXT_MODULES, fingerprints
from gen3r_training.data.latent_cache import DTYPES, Recipe, StoredClip, clip_id
from gen3r_training.data.layout import SceneFolder, read_scene
from gen3r_training.data.scenes import Clip

Progress = Callable[[str, int, int], None]  # stage, done, total
CLIPS, PROMPTS = "encode clips", "encode prompts"


def encode_dataset(config: LatentCacheConfig, progress: Progress) -> CacheReport:
    """Encode every clip and prompt of a data set that its cache does not hold yet.

    Checks data, weights and cache before anything is loaded; loads a module only where there is
    work for it.

    Raises
    ------
    ValueError : in one line: as `open_dataset`, a checkpoint that lacks something, a folder that is
        no cache or one of another recipe.
    OSError : the cache cannot be written, or the disk is full; what was written before stays.
    """
    dataset = open_dataset(
        config.data_root,
        config.split,
        num_frames=config.num_frames,
        resolution=config.resolution,
        max_stride=config.max_stride,
        skip_bad_scenes=config.skip_bad_scenes,
    )
    places = _places(config)
    check_writable(config.cache_dir)
    recipe = _recipe(config, places)
    _admit(config.cache_dir, recipe)
    recipe.write(config.cache_dir)  # which clips there are may have changed
    with CacheWriter(config.cache_dir) as writer:
        scenes = [path for paths in dataset.scenes for path in paths]
        work = _Filling(config, recipe, places, scenes, writer, progress)
        work.prompts()
        work.clips()
    return CacheReport(
        work.encoded,
        work.reused,
        work.failed,
        work.damaged,
        work.unreadable,
        work.prompts_encoded,
        dataset.skipped,
    )


def _places(config: LatentCacheConfig) -> dict[str, Path]:
    """Module -> its folder or file, headers checked. CheckpointError where one is not whole."""
    folder = resolve_checkpoint(config.pretrained_path)
    places = {name: folder / name for name in (*CLIP_MODULES, *TEXT_MODULES, "transformer")}
    if config.geo_adapter is not None:
        places["geo_adapter"] = config.geo_adapter
    for name in (*CLIP_MODULES, "text_encoder"):
        problems = inspect_place(name, places[name]).problems
        if problems:
            raise ValueError(f"{name} in {places[name]}: {problems[0]}")
    if not places["tokenizer"].is_dir():
        raise ValueError(f"--pretrained_path: folder {places['tokenizer']} is missing")
    return places


def _recipe(config: LatentCacheConfig, places: dict[str, Path]) -> Recipe:
    transformer = read_config(COMPONENTS["transformer"], places["transformer"])
    return Recipe(
        num_frames=config.num_frames,
        resolution=config.resolution,
        max_stride=config.max_stride,
        clips_per_scene=config.clips_per_scene,
        seed=config.seed,
        dtype=config.dtype,
        text_len=cast(TransformerConfig, transformer).text_len,
        control_geometry=config.upstream_control_geometry,
        tokens=config.tokens,
        weights=fingerprints(places, (*CLIP_MODULES, *TEXT_MODULES)),
    )


def _admit(folder: Path, recipe: Recipe) -> None:
    """ValueError where a folder holds something else than this recipe's entries."""
    if not (folder / "recipe.json").is_file():
        if any(not path.name.startswith(cache_files.TEMPORARY) for path in folder.glob("*")):
            raise ValueError(
                f"--cache_dir {folder} is no latent cache and not empty; choose another folder"
            )
        return
    present = Recipe.read(folder)
    old, new = (r.contents() | r.weights for r in (present, recipe))
    changed = sorted(name for name in new.keys() - {"weights"} if old.get(name) != new[name])
    if changed:
        raise ValueError(
            f"--cache_dir {folder} holds clips of another recipe ({', '.join(changed)} differ); "
            "choose another folder, or remove this one"
        )


@dataclass(frozen=True)
class _Clip:
    """A clip that the cache should hold: a scene's folder and which of its frames."""

    path: Path
    indices: tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    """What looking for a clip gave: it is ``there``, another process is at it (``busy``), its
    frames are read and it is claimed (``read``), or it cannot be had (``failed``).

    clip : its place in the index. key : its entry.
    """

    state: str
    clip: str = ""
    key: str = ""
    frames: Clip | None = None
    reason: str = ""


@dataclass
class _Filling:
    """One run of `encode_dataset`: its inputs and what it has done so far."""

    config: LatentCacheConfig
    recipe: Recipe
    places: dict[str, Path]
    scenes: list[Path]
    writer: CacheWriter
    progress: Progress
    encoded: int = 0
    reused: int = 0
    prompts_encoded: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)

    def prompts(self) -> None:
        """Every prompt that training can ask for, and the empty one of dropped text."""
        wanted = {""}
        for path in self.scenes:
            for caption in read_scene(path).captions:
                wanted.update(possible_prompts(caption))
        keys = {prompt: self.recipe.text_key(prompt) for prompt in sorted(wanted)}
        missing = [p for p, key in keys.items() if not self._sound(self._entry("text", key))]
        if not missing:
            return
        self.progress(PROMPTS, 0, len(missing))
        dtype, device = DTYPES[self.recipe.dtype], self.config.torch_device
        encoder = load_text_encoder(self.places, self.recipe.text_len, dtype, device)
        # Those that another process is at come again at the end, in case it has died.
        todo, done = deque((prompt, False) for prompt in missing), 0
        while todo:
            prompt, wait = todo.popleft()
            if self._encode_prompt(encoder, prompt, keys[prompt], wait):
                done += 1
                self.progress(PROMPTS, done, len(missing))
            else:
                todo.append((prompt, True))

    def _encode_prompt(self, encoder: TextEncoder, prompt: str, key: str, wait: bool) -> bool:
        """Whether the entry is there now; False when another process is at it."""
        if not self.writer.claim(key, wait=wait):
            return False
        path = self._entry("text", key)
        try:
            if not self._sound(path):
                features = encode_prompt(encoder, prompt).cpu().contiguous()
                cache_files.write_entry(path, {"text": features})
                self.prompts_encoded += 1
        finally:
            self.writer.release(key)
        return True

    def clips(self) -> None:
        """Every clip of every scene; those of other processes last, in case these died."""
        plan = list(dict.fromkeys(clip for path in self.scenes for clip in self._clips_of(path)))
        self.progress(CLIPS, 0, len(plan))
        done = 0
        busy: list[_Clip] = []
        for clip, found in self._read_ahead(plan):
            if found.state == "busy":
                busy.append(clip)
                continue
            self._settle(clip, found)
            done += 1
            self.progress(CLIPS, done, len(plan))
        for clip in busy:  # one at a time: whoever waits for a claim must hold none
            self._settle(clip, self._look(clip, wait=True))
            done += 1
            self.progress(CLIPS, done, len(plan))

    def _clips_of(self, path: Path) -> Iterator[_Clip]:
        total = len(read_scene(path).frames)
        for number in range(self.config.clips_per_scene):
            seed = self.recipe.clip_seed(path.name, number)
            frames, stride = self.config.num_frames, self.config.max_stride
            yield _Clip(path, tuple(choose_frames(total, frames, stride, seed)))

    def _read_ahead(self, plan: Sequence[_Clip]) -> Iterator[tuple[_Clip, _Found]]:
        """Look for every clip in turn; threads read the next ones while one is encoded."""
        threads = self.config.num_workers
        if threads == 0:
            yield from ((clip, self._look(clip)) for clip in plan)
            return
        pool = ThreadPoolExecutor(threads)
        ahead: deque[tuple[_Clip, Future[_Found]]] = deque()
        try:
            for clip in plan:
                ahead.append((clip, pool.submit(self._look, clip)))
                if len(ahead) > threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            yield from ((clip, future.result()) for clip, future in ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    def _look(self, clip: _Clip, *, wait: bool = False) -> _Found:
        try:
            scene = read_scene(clip.path)
            name, key = clip_id(scene, clip.indices), clip_key(self.recipe, scene, clip.indices)
            if self._complete(key):
                return _Found("there", name, key)
            if not self.writer.claim(key, wait=wait):
                return _Found("busy")
            if self._complete(key):  # finished between the two questions
                self.writer.release(key)
                return _Found("there", name, key)
            try:
                frames = read_clip(scene, clip.indices, self.config.resolution)
            except BaseException:
                self.writer.release(key)
                raise
            return _Found("read", name, key, frames)
        except (ValueError, OSError) as error:
            return _Found("failed", reason=str(error))

    def _settle(self, clip: _Clip, found: _Found) -> None:
        if found.state == "failed":
            self.failed[scene_name(clip.path)] = found.reason
            return
        if found.frames is None:
            self.reused += 1
        else:
            self._encode(found.key, found.frames)
            self.encoded += 1
            if found.frames.unreadable:
                self.unreadable[scene_name(clip.path)] = len(found.frames.unreadable)
        self.writer.note(found.clip, found.key)
        self.writer.release(found.key)

    def _encode(self, key: str, clip: Clip) -> None:
        frames = clip.frames[None].to(self.config.torch_device)
        latents = encode_clip(
            self._encoders,
            frames,
            control_geometry=self.recipe.control_geometry,
            tokens=self.recipe.tokens,
        )
        if latents.tokens is not None:
            maps = latents.tokens.cpu().contiguous()
            cache_files.write_entry(self._entry("tokens", key), {"tokens": maps})
        stored = StoredClip(latents, clip.c2w, clip.intrinsics)
        cache_files.write_entry(self._entry("clips", key), stored.tensors())

    @cached_property
    def _encoders(self) -> ClipEncoders:
        return load_clip_encoders(self.places, DTYPES[self.recipe.dtype], self.config.torch_device)

    def _entry(self, kind: str, key: str) -> Path:
        return entry_path(self.config.cache_dir, kind, key)

    def _complete(self, key: str) -> bool:
        kinds = ("clips", "tokens") if self.recipe.tokens else ("clips",)
        return all(self._sound(self._entry(kind, key)) for kind in kinds)

    def _sound(self, path: Path) -> bool:
        try:
            cache_files.read_entry(path)
        except FileNotFoundError:
            return False
        except DamagedEntry as error:
            self.damaged[str(path)] = str(error)
            return False
        return True


def clip_key(recipe: Recipe, scene: SceneFolder, indices: Sequence[int]) -> str:
    """Key of a clip's entry: everything that it depends on. Reads the frames' files.

    Raises
    ------
    OSError : a frame's file is gone.
    """
    distinct = list(dict.fromkeys(indices))
    contents = []
    for path in scene.frame_paths(distinct):
        with path.open("rb") as file:
            contents.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest(
        cache_files.FORMAT, recipe.contents(), scene.cameras_digest, contents, list(indices)
    )
