"""Finding TensorRT or TensorRT-RTX, and what the two (and TensorRT 10 and 11) do differently.

TensorRT proper builds for the GPU at hand, Hopper among them. TensorRT-RTX builds for GeForce and
RTX GPUs without needing one and compiles the kernels on the user's machine; it refuses to run on
Hopper. Both are strongly typed here: the types are those of the ONNX file.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
# The wheels on PyPI that together hold TensorRT-RTX: libraries and Python bindings.
RTX_LIBRARIES, RTX_BINDINGS = "onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"
RTX_CAPABILITIES = ("80", "86", "89", "120")  # built for where there is no GPU
INSTALL = "pip install 'gen3r-engine[tensorrt]' (Hopper) or 'gen3r-engine[tensorrt-rtx]'"


@dataclass(frozen=True)
class Library:
    """TensorRT as it was found.

    Parameters
    ----------
    kind : ``tensorrt`` or ``tensorrt-rtx``.
    version : its own, e.g. ``10.13.3.9``.
    module : the Python bindings, `trt` in NVIDIA's examples.
    """

    kind: str
    version: str
    module: Any

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return self.kind == RTX

    @property
    def major(self) -> int:
        """First number of the version (RTX counts apart: 1)."""
        return int(self.version.split(".")[0])

    @property
    def network_flags(self) -> int:
        """For `create_network`: strongly typed. TensorRT 11 has nothing else and ignores the flag,
        which a later version may therefore drop."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        if flag is not None:
            return 1 << int(flag)
        if not self.rtx and self.major < 11:
            raise ValueError(
                f"TensorRT {self.version} has no strongly typed networks; install 10.0 or later"
            )
        return 0

    @property
    def timing_cache(self) -> bool:
        """Whether timings can be kept between builds. RTX times nothing when it builds, and its
        `ITimingCache` asks for a GPU and changes nothing (release notes 1.3)."""
        return not self.rtx

    def capability(self, number: str) -> Any:
        """`ComputeCapability` of TensorRT-RTX for a number such as ``89``.

        Raises
        ------
        ValueError : TensorRT proper, or a capability that RTX does not know.
        """
        if not self.rtx:
            raise ValueError(
                f"TensorRT {self.version} builds for the GPU at hand only, not for a compute "
                f"capability ('{number}'); leave it out, or install TensorRT-RTX"
            )
        known = self.module.ComputeCapability.__members__
        name = f"SM{number}"
        if name not in known:
            names = [key[2:] for key in known if key.startswith("SM")]
            mend = "; use TensorRT proper on that GPU" if number in ("90", "100") else ""
            raise ValueError(
                f"TensorRT-RTX {self.version} does not support compute capability {dotted(number)} "
                f"(known: {', '.join(map(dotted, names))}){mend}"
            )
        return known[name]


def dotted(number: str) -> str:
    """``89`` -> ``8.9``, ``120`` -> ``12.0``."""
    return f"{number[:-1]}.{number[-1]}"


def gpu_capability() -> str | None:
    """Compute capability of torch's current GPU as ``89``; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def find_library(prefer: str | None = None) -> Library:
    """TensorRT proper or TensorRT-RTX, whichever can build here.

    Parameters
    ----------
    prefer : ``tensorrt`` or ``tensorrt-rtx``: this one or an error. None: TensorRT proper where it
        is installed, but RTX where there is no GPU, because TensorRT proper needs one; whatever is
        installed where only one is.

    Raises
    ------
    ValueError : nothing installed (with the mend), or libraries that do not load (with the cause).
    """
    if prefer not in (None, TENSORRT, RTX):
        raise ValueError(f"library '{prefer}' is unknown; known: {TENSORRT}, {RTX}")
    if prefer is not None:
        order = [prefer]
    elif torch.cuda.is_available():
        order = [TENSORRT, RTX]
    else:
        order = [RTX, TENSORRT]
    reasons = []
    for kind in order:
        try:
            return _load(kind)
        except (ImportError, OSError) as error:
            reasons.append(f"{kind}: {' '.join(str(error).split())}")
    raise ValueError(f"no TensorRT found ({'; '.join(reasons)}); {INSTALL}")


@cache
def _load(kind: str) -> Library:
    if kind == TENSORRT:
        module = importlib.import_module("tensorrt")
    elif importlib.util.find_spec("tensorrt_rtx") is not None:
        module = importlib.import_module("tensorrt_rtx")
    else:
        module = _bindings_of_wheels()
    return Library(kind, str(module.__version__), module)


def _bindings_of_wheels() -> Any:
    """TensorRT-RTX of the two PyPI wheels: the libraries lie in one, the bindings in the other.

    The bindings name `libtensorrt_rtx.so.1`, which no search path holds; the loader takes a library
    of that name that is in the process already.
    """
    spec = importlib.util.find_spec(RTX_LIBRARIES)
    if spec is None or spec.origin is None:
        raise ImportError(f"No module named '{RTX_LIBRARIES}'")
    folder = Path(spec.origin).parent
    _open_runtime(folder)
    for name in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
        ctypes.CDLL(str(_newest(folder, name)))
    return importlib.import_module(RTX_BINDINGS)


def _open_runtime(folder: Path) -> None:
    """The CUDA runtime library beside TensorRT-RTX, unless torch has brought its own."""
    file = _newest(folder, "libcudart.so.*")
    soname = ".".join(file.name.split(".")[:3])
    try:
        ctypes.CDLL(soname, mode=os.RTLD_NOLOAD)
    except OSError:
        ctypes.CDLL(str(file))


def _newest(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if not files:
        raise OSError(f"{folder} has no {pattern}")
    return files[-1]
