"""What is installed and what the process used: for run.json and `gen3r-engine doctor`."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata

from gen3r_engine.native import API, native

PACKAGES = (
    *("gen3r-engine", "torch", "triton", "transformers", "diffusers", "huggingface_hub"),
    *("safetensors", "numpy", "scipy", "einops", "av", "pillow", "rich"),
)


EXTENSION = "gen3r_engine._C"


def versions() -> dict[str, str | None]:
    """Installed version of python and of every core package; None for one that is missing.

    The C++ extension has the number of its interface.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found[EXTENSION] = f"API {API}" if native() is not None else None
    return found


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident host memory and, with CUDA, allocated GPU memory."""
    import torch

    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu_bytes"] = max(
            torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())
        )
    return peak
