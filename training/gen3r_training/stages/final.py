"""Write OUTPUT/final_pipeline: trained weights in the published layout, beside the rest as it was.

Files that training did not change are hard links to the pretrained folder's where both lie on one
file system, and copies otherwise: nothing of the 20 GB is read into memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gen3r.checkpoint import ComponentReport
from gen3r.checkpoint_save import save_component
from gen3r.components import COMPONENTS
from gen3r.config import ComponentConfig
from gen3r.folders import whole_folder
from gen3r_kernels import Backends

# What `os.link` says across file systems, and where a file system has no hard links.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


@dataclass(frozen=True)
class Trained:
    """A component with new weights: CPU tensors by parameter name, and the dtype to store."""

    name: str
    config: ComponentConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype


def write_final(
    folder: Path,
    trained: Trained,
    source: Path | None,
    replaced: Sequence[ComponentReport] = (),
) -> None:
    """The pipeline `source` with the trained component in it; None: that component's folder alone.

    The folder appears whole or not at all.

    replaced : components that come from elsewhere than `source`.

    Raises
    ------
    FileExistsError : the folder exists. ValueError : weights that are not the component's.
    OSError : it cannot be written.
    """
    folder = folder.absolute()
    with whole_folder(folder.parent, folder.name) as pending:
        if source is not None:
            others = {trained.name, *(report.name for report in replaced)}
            for entry in sorted(source.iterdir()):
                if entry.name not in others and not entry.name.startswith("."):
                    _link_tree(entry, pending.path / entry.name)
        for report in replaced:
            _link_component(report, pending.path / report.name)
        _save(trained, pending.path / trained.name)


def _save(trained: Trained, folder: Path) -> None:
    component = COMPONENTS[trained.name]
    with torch.device("meta"):
        module = component.build(trained.config, Backends())
    state = {name: tensor.to("cpu", trained.dtype) for name, tensor in trained.weights.items()}
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(state)) or [
        name for name, tensor in expected.items() if tensor.shape != state[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} trained tensors are not those of the {trained.name}, the first is "
            f"{wrong[0]}"
        )
    module.load_state_dict(state, strict=True, assign=True)
    save_component(component, module, trained.config, folder)


def _link_component(report: ComponentReport, folder: Path) -> None:
    folder.mkdir()
    beside = report.files[0].path.parent
    jsons = [path for path in sorted(beside.glob("*.json")) if path.is_file()]
    for path in [*jsons, *(file.path for file in report.files)]:
        _link(path, folder / path.name)


def _link_tree(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _link_tree(entry, target / entry.name)
    else:
        _link(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # a hub cache holds symbolic links
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
