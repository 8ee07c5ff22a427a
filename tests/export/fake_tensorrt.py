"""A small stand-in for the `tensorrt` module: one engine that copies its input to its output.

It lies in host memory, so what surrounds TensorRT can be tested without a GPU.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gen3r_export.tensorrt_library import Library

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT32 FP4")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
Mode = enum.Enum("Mode", "INPUT OUTPUT")


class ILogger:
    """Base class of the logger."""


class Context:
    """Execution context of the copying engine; the tests set what shall fail."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.streams: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return ["x"] if self.engine.unknown_shapes else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.fails:
            self.engine.module.say("ERROR", "Error Code 1: Cuda Runtime\n(an illegal access)")
            return False
        self.streams.append(stream)
        size = 4
        for length in self.shape:
            size *= length
        ctypes.memmove(self.addresses["y"], self.addresses["x"], size)
        return True


class Engine:
    """x [1..4, 3] float32 -> y."""

    num_io_tensors = 2
    device_memory_size_v2 = 3 << 30

    def __init__(self, module: Any) -> None:
        self.module = module
        self.element = DataType.FLOAT
        self.fails = self.unknown_shapes = self.full = False

    def get_tensor_name(self, index: int) -> str:
        return "yx"[index]  # TensorRT promises no order between inputs and outputs

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.element

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> Context | None:
        if self.full:
            self.module.say("ERROR", "OutOfMemory")
            return None
        return Context(self)


def fake_library(kind: str = "tensorrt", version: str = "10.13.3") -> Library:
    """A library whose plans are `b"plan"`; others are refused as TensorRT refuses them."""
    module: Any = ModuleType("tensorrt")
    module.ILogger, module.TensorIOMode = ILogger, Mode
    module.ComputeCapability = enum.Enum("ComputeCapability", "NONE SM80 SM86 SM89 SM120")
    loggers: list[Any] = []
    module.say = lambda severity, text: loggers[0].log(Severity[severity], text)
    module.engine = Engine(module)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            loggers[:] = loggers or [logger]

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if plan == b"plan":
                return module.engine
            module.say("WARNING", "not the reason")
            module.say("ERROR", "deserializeCudaEngine: Error Code 1: magicTag\n mismatch")
            return None

    module.Runtime = Runtime
    return Library(kind, version, module)


@pytest.fixture
def host_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch says that there is a GPU of capability 8.9; it is not to be touched."""

    @contextmanager
    def device(_: Any) -> Iterator[None]:
        yield

    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    yield
