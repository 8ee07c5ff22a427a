"""AOTInductor packages: what is noted inside one, and running one without the model's code.

A package (``<graph>.pt2``, a zip file) holds a compiled library with its weights, and a note
(`Note`) of what its inputs are and of where it runs. It is a program: open packages of people whom
you trust.
"""

from __future__ import annotations

import json
import platform
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r_export.graph import DimRange, TensorSpec
from gen3r_export.onnx_runner import check_inputs

KEY = "gen3r_export"  # of the note in the package's metadata
SCHEMA = 1
SUFFIX = "_metadata.json"
INSTRUCTIONS = ("DEFAULT", "AVX2", "AVX512")  # of x86 CPUs, each a part of the next


@dataclass(frozen=True)
class Machine:
    """Where a package runs.

    device : ``cpu`` or ``cuda``. torch : version, as 2.13. cuda : of torch, None on the CPU.
    gpu, capability : the GPU's name and compute capability ("90"). cpu : architecture and vector
        instructions, where the device is the CPU.
    """

    device: str
    torch: str
    cuda: str | None = None
    gpu: str | None = None
    capability: str | None = None
    cpu: str | None = None

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine. ValueError without the GPU that is asked for."""
        version = ".".join(torch.__version__.split(".")[:2])
        kind = torch.device(device)
        if kind.type == "cpu":
            instructions = torch.backends.cpu.get_cpu_capability()
            return cls("cpu", version, cpu=f"{platform.machine()} {instructions}")
        if kind.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"device '{device}' is not here; open or export packages on 'cpu'")
        major, minor = torch.cuda.get_device_capability(kind)
        name = torch.cuda.get_device_name(kind)
        return cls("cuda", version, torch.version.cuda, name, f"{major}{minor}")

    def refusal(self, here: Machine) -> str | None:
        """None where a package made for this machine runs on another, else the reason."""
        if self.device != here.device:
            return f"it was made for device {self.device}, not {here.device}"
        if self.torch != here.torch:
            return f"it was made with torch {self.torch}, here is {here.torch}"
        if self.device == "cuda":
            if self.cuda != here.cuda:
                return f"it was made with CUDA {self.cuda}, torch has {here.cuda} here"
            if self.capability != here.capability:
                return (
                    f"it was made for compute capability {self.capability} ({self.gpu}), this GPU "
                    f"has {here.capability} ({here.gpu})"
                )
        elif not _runs(self.cpu or "", here.cpu or ""):
            return f"it was made for a CPU with {self.cpu}, this one has {here.cpu}"
        return None


def _runs(made: str, here: str) -> bool:
    """Whether code for one CPU, "x86_64 AVX2", runs on another."""
    if made == here:
        return True
    (kind, _, wanted), (other, _, given) = made.partition(" "), here.partition(" ")
    known = wanted in INSTRUCTIONS and given in INSTRUCTIONS
    return kind == other and known and INSTRUCTIONS.index(wanted) < INSTRUCTIONS.index(given)


@dataclass(frozen=True)
class Note:
    """What a package says of itself.

    inputs, outputs, dims : as `Graph`. orders : of each input, its axes from the one whose
        neighbours lie farthest apart in memory; what was compiled reads no other.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    orders: tuple[tuple[int, ...], ...]
    machine: Machine

    def text(self) -> str:
        """As JSON, for the package."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def of(cls, text: str) -> Note:
        """From JSON. KeyError, TypeError or ValueError for another text."""
        given = json.loads(text)
        if given.pop("schema") != SCHEMA:
            raise ValueError("another schema")

        def specs(values: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(v["name"], tuple(v["shape"]), v["dtype"]) for v in values)

        return cls(
            name=given["name"],
            inputs=specs(given["inputs"]),
            outputs=specs(given["outputs"]),
            dims={name: DimRange(**dim) for name, dim in given["dims"].items()},
            orders=tuple(tuple(order) for order in given["orders"]),
            machine=Machine(**given["machine"]),
        )


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The axes of x from the one whose neighbours lie farthest apart; those of length 1 last."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda a: (x.shape[a] == 1, -strides[a], a)))


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x itself where its memory is dense in this order of axes, else a copy that is."""
    dense = 1
    for axis in reversed(order):
        if x.shape[axis] != 1 and x.stride(axis) != dense:
            break
        dense *= x.shape[axis]
    else:
        return x
    places = [order.index(axis) for axis in range(x.dim())]
    return x.permute(order).contiguous().permute(places)


class AotiRunner:
    """An open package: ``runner(*inputs)`` gives the outputs as a tuple.

    A call launches on the current stream and does not wait for the GPU; its memory comes from
    PyTorch's allocator. So it can be captured in a CUDA graph, after one call that is not captured
    (which loads the kernels). Calls from several threads wait for one another.

    Attributes
    ----------
    names_in, names_out : of the tensors, in order.
    inputs, outputs, dims : as `Graph`. device : that inputs must be on.
    """

    def __init__(self, note: Note, model: Any, device: str) -> None:
        self.inputs, self.outputs, self.dims = note.inputs, note.outputs, dict(note.dims)
        self.names_in = tuple(spec.name for spec in note.inputs)
        self.names_out = tuple(spec.name for spec in note.outputs)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._name, self._orders, self._model = note.name, note.orders, model
        self._ranges = {name: (dim.least, dim.most) for name, dim in note.dims.items()}
        self._seen: set[tuple[object, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in order, on the runner's device.

        Inputs in another memory order than the package was compiled for are copied into it.

        Raises
        ------
        ValueError : another number of inputs, a dtype, device or shape that the package does not
            take.
        """
        asked = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if asked not in self._seen:
            self._check(inputs)
            self._seen.add(asked)
        ordered = [in_order(x, order) for x, order in zip(inputs, self._orders, strict=True)]
        with self._lock, torch.no_grad():
            return tuple(self._model(*ordered))

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        check_inputs(self._name, self.inputs, self._ranges, inputs)
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x.device != self.device:
                raise ValueError(
                    f"{self._name} is open on {self.device} and input '{spec.name}' is on "
                    f"{x.device}; move it there"
                )


def read_note(path: Path) -> Note:
    """What a package says of itself; every byte of it is read and compared with its checksum.

    Raises
    ------
    ValueError : a file that is missing, cut short, changed, or no package of this project.
    """
    try:
        with zipfile.ZipFile(path) as package:
            broken = package.testzip()
            names = [name for name in package.namelist() if name.endswith(SUFFIX)]
            notes = [json.loads(package.read(name)).get(KEY) for name in names if broken is None]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; export it again or name another folder") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: bytes that say "encrypted", or a version of zip that there is none of
        raise ValueError(
            f"{path} is cut short or is no package ({' '.join(str(error).split())}); export it "
            "again"
        ) from error
    if broken is not None:
        raise ValueError(f"{path} was changed: '{broken}' differs from its checksum; export again")
    text = next((note for note in notes if note is not None), None)
    if text is None:
        raise ValueError(f"{path} is not a package of gen3r_export; export it with format 'aoti'")
    try:
        return Note.of(text)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was made by another version of gen3r_export; export again"
        ) from error


def open_aoti(path: Path, device: str = "cpu") -> AotiRunner:
    """Open a package on ``cpu``, ``cuda`` or ``cuda:1``.

    Raises
    ------
    ValueError : a file that is missing, cut short or changed, or that was made for another device,
        GPU, CPU or version of torch; one line.
    """
    note = read_note(Path(path))
    here = Machine.here(device)
    reason = note.machine.refusal(here)
    if reason is not None:
        raise ValueError(f"{path} does not run here: {reason}; export it here")
    index = torch.device(device).index
    try:
        model = torch._inductor.aoti_load_package(
            str(path),
            run_single_threaded=True,  # the other way records events, which no capture allows
            device_index=-1 if index is None else index,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{path} cannot be loaded ({' '.join(str(error).split())[:300]}); export it again"
        ) from error
    return AotiRunner(note, model, device)
