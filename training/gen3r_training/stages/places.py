"""Where the components of a run lie, checked by the names and shapes in their headers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from gen3r.checkpoint import (
    CheckpointError,
    ComponentReport,
    checked_reports,
    inspect_place,
    read_tensors,
    resolve_checkpoint,
)

INDEX = "model_index.json"


def find_component(flag: str, name: str, path: Path) -> ComponentReport:
    """A component at `path`: its folder, one file, or a folder with ``name/`` in it.

    Raises
    ------
    ValueError : nothing there, or tensors that are not the component's; the text begins with the
        flag.
    """
    place = component_place(name, path)
    if not place.exists():
        raise ValueError(f"--{flag} {path}: there is no such file or folder")
    try:
        report = inspect_place(name, place)
    except OSError as error:
        raise ValueError(f"--{flag} {path} cannot be read ({error.strerror})") from error
    if report.problems:
        first, count = report.problems[0], len(report.problems)
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise ValueError(f"--{flag} {path} does not hold the {name}: {first}{more}")
    return report


def component_place(name: str, path: Path) -> Path:
    """`path` itself, or the folder ``name/`` in it."""
    path = path.expanduser()
    return path / name if (path / name).is_dir() else path


def find_pipeline(flag: str, path: Path) -> tuple[Path, list[ComponentReport]]:
    """A whole pipeline: its folder (a hub id is downloaded) and what each component's headers say.

    Raises
    ------
    ValueError : all problems of all components; the text begins with the flag.
    """
    try:
        folder = resolve_checkpoint(path)
        return folder, checked_reports(folder)
    except CheckpointError as error:
        raise ValueError(f"--{flag} {error}") from error
    except OSError as error:
        raise ValueError(f"--{flag} {path} cannot be read ({error.strerror})") from error


def is_pipeline(path: Path) -> bool:
    """Whether a folder holds a whole pipeline rather than a component."""
    return (path.expanduser() / INDEX).is_file()


def stored_dtype(report: ComponentReport) -> torch.dtype:
    """The dtype in which a component's files hold their first tensor."""
    file = report.files[0]
    if file.path.suffix == ".safetensors":
        with safe_open(file.path, "pt") as handle:
            dtype: torch.dtype = handle.get_tensor(next(iter(file.names.values()))).dtype
            return dtype
    return next(t for _, t in read_tensors(file, file.names, torch.device("cpu"))).dtype


def token_grid_fits(fixed: tuple[int, int] | None, patch: int, resolution: int) -> None:
    """Raise ValueError where an adapter with a fixed token grid cannot decode this resolution."""
    if fixed is not None and fixed != (resolution // patch, resolution // patch):
        rows, columns = fixed
        raise ValueError(
            f"--resolution {resolution}: this geometry adapter always decodes {rows} x {columns} "
            f"tokens; use {rows * patch}"
        )
