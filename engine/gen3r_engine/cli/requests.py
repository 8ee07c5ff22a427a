"""From flags, prompt files and scenes.jsonl to checked requests, before any model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r.media import InputError, Views, load_views, read_cameras
from gen3r_engine.cli.errors import user_input
from gen3r_engine.cli.progress import note

if TYPE_CHECKING:
    from gen3r.scene import Cameras, SceneRequest

_UPSTREAM_FRAMES = 49  # a video is read no further than this unless --frames says otherwise

FEWEST_FRAMES = 5  # of a clip that is judged: cameras are judged in pairs
SIZE_STEP = 56  # pixels, see `SceneRequest`


@dataclass(frozen=True)
class SceneFlags:
    """What the person said about one scene, from flags or from a line of scenes.jsonl."""

    frame_path: tuple[str, ...] = ()
    prompts: str = ""
    negative_prompt: str = "bad detailed"
    task: str | None = None
    cameras: str = "free"
    seed: int = 42
    frames: int | None = None
    size: str | None = None
    stride: int = 1


@dataclass(frozen=True)
class Plan:
    """One scene, read from disk: everything but the model's own default frames and size.

    where : which line it came from, for messages; "" for the flags themselves.
    """

    flags: SceneFlags
    where: str
    views: Views
    prompt: str
    cameras: str | Cameras

    def request(self, default_frames: int, default_size: int) -> SceneRequest:
        """The checked request. UsageError names the value that is wrong."""
        from gen3r.scene import SceneRequest

        frames = self.flags.frames or default_frames
        with user_input(self.where), warnings.catch_warnings():
            # A shortened clip is told in a note of our own, see `shortened`.
            warnings.simplefilter("ignore", UserWarning)
            height, width = parse_size(self.flags.size) or (default_size, default_size)
            request = SceneRequest(
                images=self.views.frames,
                prompt=self.prompt,
                task=self._task(),
                cameras=self.cameras,
                num_frames=frames,
                height=height,
                width=width,
                negative_prompt=self.flags.negative_prompt,
                seed=self.flags.seed,
            )
        if request.task == "allview":
            # Only what is used is kept (a request of all views holds at least 3).
            kept = self.views.frames[: max(3, request.num_frames)]
            request = dataclasses.replace(request, images=kept)
        return request

    def _task(self) -> str | None:
        if self.views.kind == "video" and self.flags.task is None:
            return "allview"  # a video of 1 or 2 frames is an error, not another task
        return self.flags.task

    def shortened(self, request: SceneRequest, default_frames: int) -> str | None:
        """Says so when the views are fewer than the frames asked for."""
        asked = self.flags.frames or default_frames
        if request.num_frames == asked:
            return None
        given = f"{len(self.views.frames)} frames for {asked} asked"
        return f"{given}: {request.num_frames} will be made (the largest 4k + 1)"


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from "560" or "560x448" (height x width). InputError otherwise."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if match is None:
        raise InputError(f"size '{text}' is not a size; use a multiple of 56 or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def check_clip(frames: int | None, size: int | None) -> None:
    """InputError where held-out clips cannot have --frames and --size; None: the model's own."""
    if frames is not None and (frames < FEWEST_FRAMES or frames % 4 != 1):
        lower = max(FEWEST_FRAMES, (frames - 1) // 4 * 4 + 1)
        near = f"{lower} or {lower + 4}" if frames > lower else str(lower)
        raise InputError(
            f"--frames {frames}: a clip has 4k + 1 frames, {FEWEST_FRAMES} or more; use {near}"
        )
    if size is not None and (size < SIZE_STEP or size % SIZE_STEP):
        near = str(max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP))
        raise InputError(f"--size {size} is not a multiple of {SIZE_STEP} pixels; use {near}")


def read_plans(args: argparse.Namespace) -> list[Plan]:
    """Every scene that the flags ask for, with its files read. UsageError for whatever is wrong."""
    base = SceneFlags(
        frame_path=tuple(args.frame_path or ()),
        prompts=args.prompts or "",
        negative_prompt=args.negative_prompt,
        task=args.task,
        cameras=" ".join(args.cameras),
        seed=args.seed,
        frames=args.frames,
        size=args.size,
        stride=args.stride,
    )
    if args.requests is None:
        with user_input():
            return [_plan(base, "", Path())]
    path = Path(args.requests)
    with user_input():
        lines = _jsonl(path)
    plans = []
    for number, values in lines:
        where = f"{path} line {number}"
        with user_input(where):
            plans.append(_plan(_override(base, values), where, path.parent))
    return plans


def _plan(flags: SceneFlags, where: str, folder: Path) -> Plan:
    """Read one scene's files; relative paths start at `folder`."""
    if not flags.frame_path:
        raise InputError("no --frame_path; give 1 image, 2 images, a folder of images or a video")
    if flags.frames is not None and (flags.frames < 1 or flags.frames % 4 != 1):
        lower = max(1, (flags.frames - 1) // 4 * 4 + 1)
        raise InputError(f"frames {flags.frames} is not 4k + 1; use {lower} or {lower + 4}")
    limit = flags.frames or _UPSTREAM_FRAMES
    paths = [folder / Path(p).expanduser() for p in flags.frame_path]
    return Plan(
        flags=flags,
        where=where,
        views=load_views(paths, stride=flags.stride, max_frames=limit),
        prompt=_prompt(flags.prompts, folder),
        cameras=_cameras(flags.cameras, folder),
    )


def _prompt(text: str, folder: Path) -> str:
    """The text itself, or the first line of a .txt file (an empty file is an empty prompt)."""
    if not text.lower().endswith(".txt"):
        return text.strip()
    path = folder / Path(text).expanduser()
    if not path.is_file():
        raise InputError(f"prompt file {path} does not exist; give the text itself or a .txt file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text; save it as UTF-8") from error
    return lines[0].strip() if lines else ""


def _cameras(text: str, folder: Path) -> str | Cameras:
    from gen3r.scene import trajectory_name

    path = folder / Path(text).expanduser()
    if text.lower().endswith(".json") or path.is_file():
        return read_cameras(path)
    return trajectory_name(text)


# ------------------------------------------------------------------------------------ scenes.jsonl

_KEYS: dict[str, tuple[type, ...]] = {
    "frame_path": (str, list),
    "prompts": (str,),
    "negative_prompt": (str,),
    "task": (str,),
    "cameras": (str,),
    "seed": (int,),
    "frames": (int,),
    "size": (int, str),
    "stride": (int,),
}
_ALIASES = {"prompt": "prompts", "num_frames": "frames", "images": "frame_path"}


def _jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a jsonl file. InputError names the line that is wrong."""
    if not path.is_file():
        raise InputError(f"requests file {path} does not exist; check the path")
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"requests file {path} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} line {number} is not valid JSON ({error}); one object per line"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f"{path} line {number} is not a JSON object; write {{...}}")
        found.append((number, values))
    if not found:
        raise InputError(f"requests file {path} holds no request; write one JSON object per line")
    return found


def _override(base: SceneFlags, values: dict[str, Any]) -> SceneFlags:
    """`base` with the values of one line."""
    changes: dict[str, Any] = {}
    for given, value in values.items():
        key = _ALIASES.get(given, given)
        if key not in _KEYS:
            near = difflib.get_close_matches(given, _KEYS, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key '{given}'; did you mean '{near}'?")
        if type(value) not in _KEYS[key]:
            wanted = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise InputError(f"'{given}' is {json.dumps(value)}; give {wanted}")
        if key == "frame_path":
            changes[key] = (value,) if isinstance(value, str) else tuple(map(str, value))
        else:
            changes[key] = str(value) if key == "size" else value
    return dataclasses.replace(base, **changes)


def tell_shortened(plans: list[Plan], requests: list[SceneRequest], default_frames: int) -> None:
    """Note every scene that gets fewer frames than asked."""
    for plan, request in zip(plans, requests, strict=True):
        text = plan.shortened(request, default_frames)
        if text is not None:
            note(f"{plan.where}: {text}" if plan.where else text)
