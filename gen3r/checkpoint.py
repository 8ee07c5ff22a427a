"""Published folder <-> modules: resolve, check against the expected tensors, stream, save.

Layout (diffusers plus ``vggt/``): one folder per component with config.json and safetensors,
tokenizer/, scheduler/, model_index.json. Every component is built on the meta device and filled
tensor by tensor in the asked dtype on the asked device, so the host never holds a float32 copy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gen3r import encoders
from gen3r.components import COMPONENTS, Component
from gen3r.config import OWN_VALUES, ComponentConfig, Gen3RConfig
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends

READ_AT_ONCE = 2**28  # entries: half a gigabyte in bf16
PICKLES = (".pth", ".pt", ".bin", ".ckpt")


class CheckpointError(ValueError):
    """A folder that does not hold a loadable Gen3R checkpoint; the message lists every problem."""


def resolve_checkpoint(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is, or a hub id downloaded into the hub's cache.

    Raises
    ------
    CheckpointError : neither an existing folder nor a hub id that can be had.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(f"{name} is not a folder; give a checkpoint folder or a hub id")
    try:
        downloaded = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "tokenizer/*"],
        )
    except Exception as error:  # the hub client raises a family of its own and of its transport
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no local folder and could not be had from the hub: {reason}"
        ) from error
    return Path(downloaded)


@dataclass(frozen=True)
class TensorFile:
    """One file of a component and the tensor names in it, as upstream spells them."""

    path: Path
    names: Mapping[str, str]  # upstream name -> name in the file
    shapes: Mapping[str, tuple[int, ...]]


def _read_headers(
    component: Component, place: Path, allow_pickle: bool
) -> tuple[list[TensorFile], list[str]]:
    """Names and shapes of every tensor in a component's folder or file, and unreadable files."""
    present = [place] if place.is_file() else sorted(place.iterdir())
    paths = [p for p in present if p.suffix == ".safetensors"]
    pickles = [p for p in present if p.suffix in PICKLES]
    if not paths and pickles and not allow_pickle:
        return [], [
            f"only pickle files ({pickles[0].name}); convert them to safetensors, or allow "
            "weights-only pickle loading (allow_pickle=True, --allow_pickle)"
        ]
    problems, files = [], []
    for path in paths or pickles:
        try:
            shapes = _shapes(path)
        except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
            problems.append(f"{path.name} cannot be read ({error}); download it again")
            continue
        add = component.prefix and not any(n.startswith(component.prefix) for n in shapes)
        names = {(component.prefix + n if add else n): n for n in shapes}
        files.append(TensorFile(path, names, {u: shapes[n] for u, n in names.items()}))
    if not paths and not pickles:
        problems.append("no safetensors files")
    return files, problems


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as handle:
            names = handle.keys()  # the handle itself is not iterable
            return {n: tuple(handle.get_slice(n).get_shape()) for n in names}
    return {n: tuple(t.shape) for n, t in _load_pickle(path).items()}


def _load_pickle(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {n: t for n, t in state.items() if isinstance(t, Tensor)}


def read_tensors(
    file: TensorFile, wanted: Container[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a file, one at a time, under upstream's names.

    On a CPU they may be views of the mapped file.
    """
    names = {upstream: name for upstream, name in file.names.items() if upstream in wanted}
    if file.path.suffix != ".safetensors":
        state = _load_pickle(file.path)
        yield from ((upstream, state[name]) for upstream, name in names.items())
        return
    # A mapped file counts as host memory as far as it was read; opening it anew bounds that.
    for group in _groups(names, file.shapes):
        with safe_open(file.path, "pt", device=str(device)) as handle:
            for upstream in group:
                yield upstream, handle.get_tensor(names[upstream])


def _groups(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in groups of at most `READ_AT_ONCE` entries; a larger tensor is a group of its own."""
    group: list[str] = []
    used = 0
    for name in names:
        size = math.prod(shapes[name])
        if group and used + size > READ_AT_ONCE:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def compare_names(
    component: Component,
    expected: Mapping[str, tuple[int, ...]],
    files: list[TensorFile],
) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor, one line each."""
    found = {name: shape for file in files for name, shape in file.shapes.items()}
    problems = [f"missing {n} {list(s)}" for n, s in expected.items() if n not in found]
    for name, shape in found.items():
        if name not in expected:
            if not component.is_tolerated(name):
                problems.append(f"unexpected {name} {list(shape)}")
        elif shape != expected[name]:
            problems.append(f"shape of {name} is {list(shape)}, expected {list(expected[name])}")
    return problems


def read_config(component: Component, folder: Path) -> ComponentConfig:
    """The component's config.json, or its defaults when there is none.

    Raises
    ------
    ValueError : malformed JSON or values that do not describe a model.
    """
    path = folder / "config.json"
    if not path.is_file():
        return component.config()
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config.json is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError("config.json does not hold an object")
    return component.config.from_dict(values)


@dataclass(frozen=True)
class ComponentReport:
    """What `inspect_checkpoint` found in one component's folder.

    expected : names and shapes that must be there. loaded : the tokenizer, the scheduler.
    """

    name: str
    ok: bool
    detail: str
    problems: list[str]
    config: ComponentConfig | None = None
    files: list[TensorFile] = field(default_factory=list)
    expected: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    loaded: Any = None


# (file, wanted names, device) -> name and tensor, one at a time; as `read_tensors`.
Reader = Callable[[TensorFile, Container[str], torch.device], Iterator[tuple[str, Tensor]]]


def inspect_component(name: str, folder: Path, allow_pickle: bool = False) -> ComponentReport:
    """Compare one component's files with what its config needs, reading headers only."""
    return inspect_place(name, folder / name, allow_pickle)


def inspect_place(name: str, place: Path, allow_pickle: bool = False) -> ComponentReport:
    """As `inspect_component` for a component that lies by itself: its folder, or its one file.

    The config is the folder's (of a file, the one beside it).
    """
    component, path = COMPONENTS[name], place.parent if place.is_file() else place
    if not path.is_dir():
        return ComponentReport(name, False, "missing", [f"folder {path} is missing"])
    try:
        config = read_config(component, path)
        expected = component.expected(config)
    except (ValueError, TypeError) as error:
        return ComponentReport(name, False, "bad config", [str(error)])
    files, problems = _read_headers(component, place, allow_pickle)
    if not problems:
        problems = compare_names(component, expected, files)
    total = sum(torch.Size(s).numel() for s in expected.values())
    detail = f"{len(expected)} tensors, {total / 1e6:,.1f} M parameters, {len(files)} file(s)"
    return ComponentReport(name, not problems, detail, problems, config, files, expected)


def inspect_checkpoint(folder: Path, allow_pickle: bool = False) -> list[ComponentReport]:
    """Check all components, the tokenizer and the scheduler of a checkpoint folder."""
    reports = [inspect_component(name, folder, allow_pickle) for name in COMPONENTS]
    for name, load in (("tokenizer", load_tokenizer), ("scheduler", load_scheduler)):
        try:
            loaded = load(folder)
        except CheckpointError as error:
            reports.append(ComponentReport(name, False, "missing or broken", [str(error)]))
        else:
            kind = type(loaded).__name__
            reports.append(ComponentReport(name, True, kind, [], loaded=loaded))
    return reports


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. CheckpointError when it is missing or broken."""
    path = folder / "tokenizer"
    if not path.is_dir():
        raise CheckpointError(f"folder {path} is missing")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizer back ends raise types of their own
        raise CheckpointError(f"tokenizer in {path} cannot be loaded ({error})") from error


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler's config of a checkpoint folder, upstream's when the folder has none."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return make_euler_scheduler()
    try:
        values = json.loads(path.read_text())
        return FlowMatchEulerDiscreteScheduler.from_config(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a scheduler config ({error})") from error


def load_component(
    report: ComponentReport,
    dtype: torch.dtype,
    device: torch.device,
    backends: Backends,
    read: Reader = read_tensors,
) -> nn.Module:
    """Build a component on meta and fill it from its files. See `fill_component`."""
    return fill_component(build_component(report, backends), report, dtype, device, read)


def build_component(report: ComponentReport, backends: Backends) -> nn.Module:
    """A component without memory. Not for several threads: torch's meta device is process-wide."""
    with torch.device("meta"):
        return COMPONENTS[report.name].build(report.config, backends)


def fill_component(
    module: nn.Module,
    report: ComponentReport,
    dtype: torch.dtype,
    device: torch.device,
    read: Reader = read_tensors,
) -> nn.Module:
    """Give a module from `build_component` its tensors, one by one.

    Tensors of another reader than `read_tensors` are taken as they are where dtype and device
    match: each must own its memory.
    """
    component = COMPONENTS[report.name]
    state: dict[str, Tensor] = {}
    borrowed = read is read_tensors
    for file in report.files:
        for name, tensor in read(file, report.expected, device):
            pairs = (
                [(name, tensor)]
                if component.keys is None
                else component.keys.from_upstream(name, tensor)
            )
            for ours, value in pairs:
                state[ours] = _owned(value, dtype, device, borrowed)
    if component.keys is not None:
        state |= {name: state[source] for name, source in component.keys.tied.items()}
    module.load_state_dict(state, strict=True, assign=True)
    if component.keys is not None:
        encoders.finish(module)
    return module.eval().requires_grad_(False)


def _owned(tensor: Tensor, dtype: torch.dtype, device: torch.device, borrowed: bool) -> Tensor:
    """The tensor in its own memory: a view would keep a larger tensor or the mapped file alive."""
    moved = tensor.to(device, dtype)
    if moved.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return moved
    whole = moved.untyped_storage().nbytes() == moved.numel() * moved.element_size()
    return moved if whole and not borrowed else moved.clone()


def checked_reports(folder: Path, allow_pickle: bool = False) -> list[ComponentReport]:
    """`inspect_checkpoint` of a folder that is to be loaded.

    Raises
    ------
    CheckpointError : all problems of all components in one message.
    """
    reports = inspect_checkpoint(folder, allow_pickle)
    problems = [f"{r.name}: {p}" for r in reports for p in r.problems]
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return reports


def pipeline_values(folder: Path, reports: list[ComponentReport]) -> dict[str, Any]:
    """What a `Gen3RPipeline` is made of beside the six modules, as keyword arguments."""
    ours = read_own_values(folder)
    found = {r.name: r for r in reports}
    configs: dict[str, Any] = {name: found[name].config for name in COMPONENTS}
    sizes = {k: v for k, v in ours.items() if k in OWN_VALUES}
    return {
        "config": Gen3RConfig(**configs, **sizes),
        "tokenizer": found["tokenizer"].loaded,
        "scheduler": found["scheduler"].loaded,
        "untrained": bool(ours.get("untrained", False)),
    }


def pipeline_config(folder: Path) -> Gen3RConfig:
    """The configuration of a folder that has all six components, without looking at weights.

    Raises
    ------
    CheckpointError : a config.json that is missing or is not JSON. ValueError : one that cannot be.
    """
    configs: dict[str, Any] = {}
    for name, component in COMPONENTS.items():
        path = folder / name / "config.json"
        try:
            configs[name] = component.config.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
    ours = read_own_values(folder)
    return Gen3RConfig(**configs, **{k: v for k, v in ours.items() if k in OWN_VALUES})


def load_pipeline_parts(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    backends: Backends,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Everything a `Gen3RPipeline` is made of, as keyword arguments.

    Raises
    ------
    CheckpointError : all problems of all components in one message, before anything is loaded.
    """
    reports = checked_reports(folder, allow_pickle)
    load = partial(load_component, dtype=dtype, device=device, backends=backends)
    modules = {r.name: load(r) for r in reports if r.name in COMPONENTS}
    return {**pipeline_values(folder, reports), **modules}


def read_own_values(folder: Path) -> dict[str, Any]:
    """What this project adds to model_index.json: `OWN_VALUES` and untrained. {} when nothing.

    Raises
    ------
    CheckpointError : a model_index.json that is not JSON.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()).get("_gen3r_engine", {}))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a model index ({error})") from error
