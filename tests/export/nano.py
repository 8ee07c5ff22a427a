"""The embedded model's parts as ONNX files and TensorRT-RTX plans, exported once a test session."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from gen3r_export.config import ExportConfig
from gen3r_export.export import Exports, load_model, run_export
from gen3r_export.manifest import Entry
from gen3r_export.tensorrt_library import RTX_CAPABILITIES

SIZE, FRAMES = 56, 5


@cache
def nano_plans() -> tuple[Path, Exports]:
    """The folder of an export of all parts in fp32, clips of 5 frames of 56 x 56 pixels."""
    folder = Path(tempfile.mkdtemp(prefix="nano-plans-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = ExportConfig(
        format="tensorrt",
        height=SIZE,
        width=SIZE,
        frames=(FRAMES, FRAMES),
        form="clip",
        capabilities=RTX_CAPABILITIES,
        out=folder,
    )
    return folder, run_export(lambda: load_model(None, config), config, lambda line: None)


def of_format(name: str) -> list[Entry]:
    """The entries of `nano_plans` in one format."""
    _, exports = nano_plans()
    return [entry for entry in exports.entries if entry.format == name]
