"""Twins of operators: traced for a GPU without one, they show their kernels and nothing else.

Tensors are fake CUDA tensors; Triton is told of an H100, of which only the name is needed. What
AOTInductor makes of a twin's graph is checked on a GPU (tests/gpu/test_carried.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed here")

from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gen3r_kernels.carried import carried_names, carrying, twin

H100 = GPUTarget("cuda", 90, 32)
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


class Driver:
    """What tracing asks of Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        return H100


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(_triton, "has_triton_tensor_descriptor_host_tma", lambda: True)


def half(*size: int, memory: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="cuda", memory_format=memory)


def wide(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="cuda")


def arguments(name: str) -> tuple[Any, ...]:
    """Of the model's kind, made as fake tensors."""
    video = half(1, 96, 4, 20, 20, memory=LAST_3D)
    past = half(1, 96, 2, 20, 20, memory=LAST_3D)
    qkv = [half(2, 300, 12, 128) for _ in range(3)]
    rows, tables = half(2, 100, 1536), [wide(2, 1, 1536) for _ in range(3)]
    made: dict[str, tuple[Any, ...]] = {
        "attention_forward": (*qkv,),
        "bias_gelu": (half(100, 512), half(512)),
        "causal_conv3d": (video, half(96, 96, 3, 3, 3), half(96), past, video, 1, False),
        "cross_attention": (*qkv, *qkv[:2], torch.empty(2, dtype=torch.int32, device="cuda")),
        "dense_output": (half(2, 32, 8, 8, memory=LAST), half(2, 32), half(2), True),
        "gated_residual": (wide(2, 100, 1536), rows, *tables, None, None, 1e-6, torch.bfloat16),
        "layer_norm_modulate": (
            *(wide(2, 100, 1536), *tables[:2], None, None),
            *(1e-6, torch.bfloat16),
        ),
        "layer_norm_rope": (
            *(half(2, 100, 16, 64), half(2, 100, 16, 64)),
            *(half(64) for _ in range(4)),
            *(wide(100, 64), wide(100, 64), 1e-5),
        ),
        "resize_bilinear": (
            *(half(2, 128, 8, 8, memory=LAST), 16, 16, wide(16, 64), wide(16, 64), None),
        ),
        "rms_norm": (rows, half(1536), 1e-6),
        "rms_norm_rope": (
            *(rows, rows, half(1536), half(1536), wide(100, 64), wide(100, 64)),
            *(12, 1e-6),
        ),
        "rms_norm_silu": (video, half(96, 1, 1, 1), True, torch.bfloat16, past),
        "upsample_conv2d": (half(2, 192, 8, 8, memory=LAST), half(96, 192, 3, 3), half(96)),
    }
    return made[name]


LIBRARY = {"conv2d_add_relu", "linear_gelu"}  # calls of cuDNN and cuBLASLt around or for a kernel


@pytest.mark.parametrize("name", sorted(set(carried_names()) - LIBRARY))
def test_a_twin_shows_its_kernels(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = arguments(name)
        found = getattr(torch.ops.gen3r, name)(*given)
        expected = found if isinstance(found, (tuple, list)) else (found,)

        class Calls(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
                rest = iter(tensors)
                values = [next(rest) if isinstance(x, Tensor) else x for x in given]
                out = twin(name)(*values)
                return tuple(out) if isinstance(out, (tuple, list)) else (out,)

        tensors = [x for x in given if isinstance(x, Tensor)]
        with torch.no_grad():
            graph, _ = aot_export_module(Calls(), tensors, trace_joint=False)
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    kernels = [t for t in targets if t.startswith("triton_kernel_wrapper")]
    assert len(kernels) == (2 if name == "rms_norm_silu" else 1)
    assert not [t for t in targets if t.startswith("gen3r")]
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    for node, like in zip(outputs, expected, strict=True):
        value = node.meta["val"]
        assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)


def test_descriptors_need_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "has_triton_tensor_descriptor_host_tma", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = arguments("upsample_conv2d")
        with pytest.raises(ValueError, match=r"capability 9\.0 or more"):
            twin("upsample_conv2d")(*given)


def test_only_a_twin_carries() -> None:
    assert not carrying()
    assert {"causal_conv3d", "attention_forward", "linear_gelu"} <= set(carried_names())
    with pytest.raises(ValueError, match="gen3r::linear_fp8 cannot be carried"):
        twin("linear_fp8")
