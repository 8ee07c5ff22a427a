"""Running TensorRT plans on torch's CUDA tensors, without the model's code.

    runner = open_tensorrt(Path("vae_decoder.plan"), "cuda")
    (frames,) = runner(latents)

A plan runs on the GPU and the TensorRT version that it was built for; of a kind that the file name
tells (``.rtx.plan`` is TensorRT-RTX). A plan holds compiled code: open those of people whom you
trust.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r_export.tensorrt_library import RTX, TENSORRT, Library, dotted, find_library
from gen3r_export.tensorrt_messages import Messages, logger, one_line

TORCH_TYPES: dict[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "BOOL": torch.bool,
}
PLAN_NAME = re.compile(r"\.sm(\d+)\.rtx\.plan$")  # of TensorRT-RTX


@dataclass(frozen=True)
class Port:
    """An input or output of a plan.

    least, most : shapes that an input may have, equal where it is static; empty of an output.
    """

    name: str
    dtype: torch.dtype
    least: tuple[int, ...] = ()
    most: tuple[int, ...] = ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an input may have this shape."""
        return len(shape) == len(self.least) and all(
            low <= size <= high
            for low, size, high in zip(self.least, shape, self.most, strict=True)
        )

    def shapes(self) -> str:
        """The shapes in words."""
        if self.least == self.most:
            return str(list(self.least))
        return f"{list(self.least)} to {list(self.most)}"


class TensorRTRunner:
    """A plan with one execution context; calls from several threads at once are not allowed.

    Attributes
    ----------
    names_in, names_out : of the tensors, in the graph's order.
    inputs, outputs : the same with types and shapes.
    device : where the tensors lie.
    memory : bytes of activations, which TensorRT holds from the opening to the end.
    """

    def __init__(self, library: Library, engine: Any, name: str, device: torch.device) -> None:
        self.library, self.engine, self.name, self.device = library, engine, name, device
        trt = library.module
        tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [t for t in tensors if engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._input(tensor) for tensor in given)
        self.outputs = tuple(self._port(tensor) for tensor in tensors if tensor not in given)
        self.names_in = tuple(port.name for port in self.inputs)
        self.names_out = tuple(port.name for port in self.outputs)
        self.memory = int(engine.device_memory_size_v2)
        messages = Messages(library)
        self.context = engine.create_execution_context()
        if self.context is None:
            raise ValueError(
                f"{name}: no room for its {self.memory / 2**30:.1f} GiB of activations on "
                f"{device} ({messages.reason('no reason given')}); free memory or use smaller "
                "chunks"
            )

    def _port(self, name: str) -> Port:
        element = self.engine.get_tensor_dtype(name).name
        if element not in TORCH_TYPES:
            raise ValueError(f"{self.name}: tensor {name} is {element}, which torch has not")
        return Port(name, TORCH_TYPES[element])

    def _input(self, name: str) -> Port:
        dtype, shape = self._port(name).dtype, tuple(self.engine.get_tensor_shape(name))
        if min(shape, default=1) >= 0:
            return Port(name, dtype, shape, shape)
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        return Port(name, dtype, tuple(least), tuple(most))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of inputs, in the graph's order, on torch's current stream: the results are there
        when that stream has come to them.

        Raises
        ------
        ValueError : another number of inputs, an input of another shape, dtype or device than the
            plan takes, or TensorRT failing, with its reason.
        """
        self._check(inputs)
        messages = Messages(self.library)
        with torch.cuda.device(self.device):
            # Freed only after this stream has come past their use: they were made on it.
            kept = [x.detach().contiguous() for x in inputs]
            for port, x in zip(self.inputs, kept, strict=True):
                self._set(self.context.set_input_shape(port.name, tuple(x.shape)), messages)
                self._set(self.context.set_tensor_address(port.name, x.data_ptr()), messages)
            self._infer(messages)
            results = []
            for port in self.outputs:
                shape = tuple(self.context.get_tensor_shape(port.name))
                results.append(torch.empty(shape, dtype=port.dtype, device=self.device))
                address = results[-1].data_ptr()
                self._set(self.context.set_tensor_address(port.name, address), messages)
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self._set(self.context.execute_async_v3(stream), messages)
        return tuple(results)

    def _infer(self, messages: Messages) -> None:
        """Output shapes from input shapes."""
        try:
            missing = self.context.infer_shapes()
        except RuntimeError as error:
            reason = messages.reason(one_line(str(error)))
            raise ValueError(f"{self.name}: TensorRT fails: {reason}") from None
        if missing:
            raise ValueError(f"{self.name}: TensorRT does not know the shapes of {missing}")

    def _set(self, done: bool, messages: Messages) -> None:
        if not done:
            raise ValueError(f"{self.name}: TensorRT fails: {messages.reason('no reason given')}")

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self.inputs):
            names = ", ".join(self.names_in)
            raise ValueError(
                f"{self.name} takes {len(self.inputs)} inputs ({names}), got {len(inputs)}"
            )
        for port, x in zip(self.inputs, inputs, strict=True):
            if x.device != self.device:
                raise ValueError(
                    f"{self.name}: input {port.name} is on {x.device}; move it to {self.device}"
                )
            if x.dtype != port.dtype:
                raise ValueError(
                    f"{self.name}: input {port.name} is {x.dtype}; it must be {port.dtype}"
                )
            if not port.fits(x.shape):
                raise ValueError(
                    f"{self.name}: input {port.name} is {list(x.shape)}; the plan takes "
                    f"{port.shapes()}; export it for that size"
                )


def open_tensorrt(path: Path, device: str = "cuda") -> TensorRTRunner:
    """Opens a plan.

    Parameters
    ----------
    path : ``.rtx.plan`` for TensorRT-RTX, else of TensorRT proper.
    device : ``cuda`` or ``cuda:1``.

    Raises
    ------
    ValueError : no such file; no GPU, or one that the plan is not for; TensorRT not installed; a
        plan of another version, or one that was cut short or changed (TensorRT's own words).
    """
    place = _place(path, torch.device(device))
    library = find_library(RTX if path.name.endswith(".rtx.plan") else TENSORRT)
    _check_gpu(path, place, library)
    messages = Messages(library)
    with torch.cuda.device(place):
        runtime = library.module.Runtime(logger(library))
        try:
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(_refused(path, library, one_line(str(error)))) from None
        if engine is None:
            raise ValueError(_refused(path, library, messages.reason("no reason given")))
        return TensorRTRunner(library, engine, path.name, place)


def _refused(path: Path, library: Library, reason: str) -> str:
    return (
        f"{path.name} does not open in {library.kind} {library.version}: {reason}; build it here "
        "again if it is of another version or GPU, copy it again if it was cut short"
    )


def _place(path: Path, device: torch.device) -> torch.device:
    """The device with its number. ValueError where the file or a GPU is missing."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; build it again or name another folder")
    if device.type != "cuda" or not torch.cuda.is_available():
        why = "there is none" if device.type == "cuda" else f"device '{device}' was asked"
        raise ValueError(
            f"{path.name} runs on an NVIDIA GPU only, and {why}; use the ONNX file on a CPU"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device cuda:{index} is not there; {torch.cuda.device_count()} GPUs are")
    return torch.device("cuda", index)


def _check_gpu(path: Path, place: torch.device, library: Library) -> None:
    """ValueError where TensorRT-RTX, or its plan of another GPU, cannot run on this one."""
    if not library.rtx:
        return
    major, minor = torch.cuda.get_device_capability(place)
    here = f"{major}{minor}"
    library.capability(here)  # raises on a GPU that RTX does not run on, Hopper among them
    found = PLAN_NAME.search(path.name)
    if found and found[1] != here:
        raise ValueError(
            f"{path.name} is for compute capability {dotted(found[1])}, this GPU has "
            f"{dotted(here)}; build it with --capabilities {here}"
        )
