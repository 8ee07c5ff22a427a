"""ONNX files in onnxruntime, with torch tensors. Needs torch, onnx and onnxruntime, not the model.

Inputs are read where they lie and results are given as onnxruntime wrote them (DLPack): nothing is
copied between the two.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r_export.graph import DTYPES, TensorSpec

DIMS = "dims"  # metadata: JSON of {axis: [least, most]}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnxruntime's names of tensor types, and ONNX's numbers of them.
TYPES = {
    "tensor(float)": ("float32", 1),
    "tensor(int32)": ("int32", 6),
    "tensor(int64)": ("int64", 7),
    "tensor(float16)": ("float16", 10),
    "tensor(bfloat16)": ("bfloat16", 16),
}


def need(*packages: str) -> None:
    """ValueError where a package that ONNX files need is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed; pip install 'gen3r-engine[onnx]'")


class OnnxRunner:
    """An open ONNX file: ``runner(*inputs)`` gives the outputs as a tuple.

    Attributes
    ----------
    names_in, names_out : of the tensors, in order.
    inputs, outputs : their names, shapes and dtypes; an axis is a length, a name, or a text such as
        ``"2*batch"``.
    ranges : least and most length of every named axis.
    """

    def __init__(self, path: Path, session: Any, device: str) -> None:
        self.path, self.device = path, torch.device(device)
        self._session = session
        self.inputs = tuple(_spec(path, value) for value in session.get_inputs())
        self.outputs = tuple(_spec(path, value) for value in session.get_outputs())
        self.names_in = tuple(spec.name for spec in self.inputs)
        self.names_out = tuple(spec.name for spec in self.outputs)
        kept = session.get_modelmeta().custom_metadata_map
        self.ranges: dict[str, tuple[int, int]] = {
            name: (least, most) for name, (least, most) in json.loads(kept.get(DIMS, "{}")).items()
        }

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in order, on the runner's device.

        Raises
        ------
        ValueError : another number of inputs, a dtype, device or shape that the file does not take,
            or inputs that onnxruntime fails on.
        """
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        lengths = check_inputs(self.path.name, self.inputs, self.ranges, inputs)
        self._check_device(inputs)
        kept = [x.detach().contiguous() for x in inputs]  # alive until the run is over
        binding = self._session.io_binding()
        kind, index = self.device.type, self.device.index or 0
        for spec, x in zip(self.inputs, kept, strict=True):
            number = next(n for name, n in TYPES.values() if name == spec.dtype)
            binding.bind_input(spec.name, kind, index, number, list(x.shape), x.data_ptr())
        for spec in self.outputs:
            binding.bind_output(spec.name, kind, index)
        if kind == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path.name} fails in onnxruntime at {lengths}: {reason}") from (
                error
            )
        binding.synchronize_outputs()
        return tuple(_tensor(value) for value in binding.get_outputs())

    def _check_device(self, inputs: Sequence[Tensor]) -> None:
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x.device.type != self.device.type:
                raise ValueError(
                    f"{self.path.name} is open on {self.device.type} and input '{spec.name}' is on "
                    f"{x.device.type}; move it there"
                )


def open_onnx(path: Path, device: str = "cpu") -> OnnxRunner:
    """Open an ONNX file, with the file of its weights beside it, on ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError : packages or files that are missing, a file that is cut short or is no ONNX, a
        device that onnxruntime was not built for, operators that it does not run there.
    """
    need("onnx", "onnxruntime")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    kind = torch.device(device).type
    provider = PROVIDERS.get(kind)
    if provider is None or provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} here does not run on '{device}'; install "
            "onnxruntime-gpu in the place of onnxruntime, or use device 'cpu'"
        )
    check_files(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    index = torch.device(device).index or 0
    chosen: list[Any] = [provider] if kind == "cpu" else [(provider, {"device_id": str(index)})]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
    except errors.NotImplemented as error:
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} does not run {path.name} on {kind}: "
            f"{_reason(error)}; export it in fp32 or fp16"
        ) from error
    except (
        *(errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.InvalidArgument),
        *(errors.RuntimeException, UnicodeDecodeError),
    ) as error:
        raise ValueError(
            f"{path} is not an ONNX file that onnxruntime opens: {_reason(error)}; export it again"
        ) from error
    if session.get_providers()[0] != provider:  # it takes the CPU where libraries are missing
        raise ValueError(
            f"onnxruntime could not open {path.name} on '{device}': its CUDA libraries do not "
            "load; install CUDA and cuDNN of its version, or use device 'cpu'"
        )
    try:
        return OnnxRunner(path, session, device)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} was changed ({error}); export it again") from error


def check_files(path: Path) -> None:
    """ValueError for a file that is missing, cut short or no ONNX, or whose weights are."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ValueError(f"{path} does not exist; export it again or name another folder")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is cut short or is no ONNX file; export it again") from error
    if not model.opset_import or not model.graph.output:
        raise ValueError(f"{path} is cut short or is no ONNX file; export it again")
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            kept = {entry.key: entry.value for entry in tensor.external_data}
            end = int(kept.get("offset", 0)) + int(kept.get("length", 0))
            ends[kept["location"]] = max(end, ends.get(kept["location"], 0))
    for name, end in ends.items():
        beside = path.parent / name
        if not beside.is_file():
            raise ValueError(
                f"{path.name} has its weights in {name}, which is not beside it in {path.parent}; "
                "copy it there or export again"
            )
        if beside.stat().st_size < end:
            raise ValueError(
                f"{beside} has {beside.stat().st_size} bytes and {path.name} needs {end}; it is "
                "cut short: copy it again or export again"
            )


def check_inputs(
    name: str,
    specs: Sequence[TensorSpec],
    ranges: Mapping[str, tuple[int, int]],
    inputs: Sequence[Tensor],
) -> dict[str, int]:
    """The lengths of the named axes. ValueError for inputs that do not fit the specs."""
    if len(inputs) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise ValueError(f"{name} takes {len(specs)} inputs ({names}), got {len(inputs)}")
    lengths: dict[str, int] = {}
    for spec, x in zip(specs, inputs, strict=True):
        if x.dtype != DTYPES[spec.dtype]:
            raise ValueError(
                f"input '{spec.name}' of {name} is {str(x.dtype).removeprefix('torch.')}; it must "
                f"be {spec.dtype}"
            )
        fits = x.dim() == len(spec.shape) and all(
            _fits(expected, found, lengths)
            for expected, found in zip(spec.shape, x.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"input '{spec.name}' of {name} has shape {tuple(x.shape)}; expected "
                f"{_words(spec, ranges, lengths)}"
            )
    for axis, (least, most) in ranges.items():
        if axis in lengths and not least <= lengths[axis] <= most:
            raise ValueError(
                f"{name} takes {axis} from {least} to {most}, got {lengths[axis]}; export it for "
                f"that length"
            )
    return lengths


def _fits(expected: int | str, found: int, lengths: dict[str, int]) -> bool:
    """Whether a length fits; the length of the axis that a text names is kept in `lengths`."""
    if isinstance(expected, int):
        return found == expected
    product, _, added = expected.partition("+")
    factor, _, axis = product.rpartition("*")
    length, rest = divmod(found - int(added or 0), int(factor or 1))
    return rest == 0 and lengths.setdefault(axis, length) == length


def _words(
    spec: TensorSpec, ranges: Mapping[str, tuple[int, int]], lengths: Mapping[str, int]
) -> str:
    shape = ", ".join(str(length) for length in spec.shape)
    known = [f"{axis} from {least} to {most}" for axis, (least, most) in ranges.items()]
    return f"[{shape}]" + (f" with {', '.join(known)}" if known else "")


def _spec(path: Path, value: Any) -> TensorSpec:
    if value.type not in TYPES:
        raise ValueError(f"{path.name} has '{value.name}' of {value.type}, which is not supported")
    shape = tuple("?" if length is None else length for length in value.shape)
    return TensorSpec(value.name, shape, TYPES[value.type][0])


def _tensor(value: Any) -> Tensor:
    return torch.from_dlpack(value)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
