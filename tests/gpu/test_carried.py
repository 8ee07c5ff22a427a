"""Operators inside AOTInductor packages on a GPU: the twin, and the package, give the operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gen3r_export.aoti import compile_package, open_aoti
from gen3r_export.aoti_carried import carry, options
from gen3r_export.aoti_package import Machine
from gen3r_export.compare import largest_error
from gen3r_export.graph import Graph, TensorSpec
from gen3r_export.trace import trace
from gen3r_kernels import (
    Backends,
    attention,
    causal_conv3d,
    conv2d_add_relu,
    cross_attention,
    dense_output,
    gated_residual,
    layer_norm_modulate,
    linear,
    resize_bilinear,
    rms_norm,
    rms_norm_rope,
    rms_norm_silu,
    upsample_conv2d,
)

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
TRITON = Backends(operators="triton", attention="triton")
Case = tuple[Callable[..., object], tuple[Tensor, ...]]


def half(*size: int, memory: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(size, device="cuda").bfloat16().contiguous(memory_format=memory)


def _video(channels: int) -> tuple[Tensor, ...]:
    x = half(1, channels, 2, 20, 36, memory=LAST_3D)
    return x, half(channels, channels, 3, 3, 3) / 40, half(channels), x.clone(), x.clone()


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, added: Tensor) -> Tensor:
    return causal_conv3d(x, weight, bias, past, residual=added, backends=TRITON)


CASES: dict[str, Callable[[], Case]] = {
    "causal_conv3d 96": lambda: (_convolution, _video(96)),
    "causal_conv3d 192": lambda: (_convolution, _video(192)),
    "causal_conv3d 128": lambda: (_convolution, _video(128)),
    "causal_conv3d rgb": lambda: (
        lambda x, w: causal_conv3d(x, w, None, backends=TRITON),
        (half(1, 3, 2, 20, 36, memory=LAST_3D), half(96, 3, 3, 3, 3) / 9),
    ),
    "causal_conv3d pairs": lambda: (
        lambda x, w: causal_conv3d(x, w, None, padding=(0, 0, 0), pairs=True, backends=TRITON),
        (half(1, 384, 2, 9, 18, memory=LAST_3D), half(768, 384, 3, 1, 1) / 34),
    ),
    "upsample_conv2d 96": lambda: (
        lambda x, w, b: upsample_conv2d(x, w, b, backends=TRITON),
        (half(2, 192, 9, 17, memory=LAST), half(96, 192, 3, 3) / 40, half(96)),
    ),
    "upsample_conv2d 192": lambda: (
        lambda x, w, b: upsample_conv2d(x, w, b, backends=TRITON),
        (half(2, 384, 9, 17, memory=LAST), half(192, 384, 3, 3) / 60, half(192)),
    ),
    "rms_norm_silu": lambda: (
        lambda x, g, lead: rms_norm_silu(x, g, lead=lead, backends=TRITON),
        (*(half(1, 96, 4, 9, 17, memory=LAST_3D), half(96, 1, 1, 1)), half(1, 96, 2, 9, 17)),
    ),
    "conv2d_add_relu": lambda: (
        lambda x, w, b, r: (
            conv2d_add_relu(x, w, b, r, False, backends=TRITON),
            conv2d_add_relu(x, w, b, r, True, backends=TRITON),
            conv2d_add_relu(x, w, b, None, True, backends=TRITON),
        ),
        (
            *(half(2, 64, 9, 17, memory=LAST), half(64, 64, 3, 3) / 24, half(64)),
            half(2, 64, 9, 17, memory=LAST),
        ),
    ),
    "resize_bilinear": lambda: (
        lambda x, a, d: resize_bilinear(x, (16, 12), position=(a, d), backends=TRITON),
        (half(2, 64, 8, 6, memory=LAST), half(12, 32).float(), half(16, 32).float()),
    ),
    "dense_output": lambda: (
        lambda x, w, b: dense_output(x, w, b, exponential=True, backends=TRITON),
        (half(2, 32, 8, 6, memory=LAST), half(2, 32) / 6, half(2)),
    ),
    "transformer": lambda: (
        lambda s, y, t, q, w, c: (
            layer_norm_modulate(s, t, t, out_dtype=torch.bfloat16, backends=TRITON),
            *gated_residual(s, y, t, t, t, out_dtype=torch.bfloat16, backends=TRITON),
            rms_norm(y, w, backends=TRITON),
            *rms_norm_rope(q, y, w, w, c, c, num_heads=12, backends=TRITON),
        ),
        (
            *(half(2, 100, 1536).float(), half(2, 100, 1536), half(2, 1, 1536).float()),
            *(half(2, 100, 1536), half(1536), half(100, 64).float()),
        ),
    ),
    "linear": lambda: (
        lambda x, w, b: linear(x, w, b, activation="gelu_tanh", backends=TRITON),
        (half(2, 100, 256), half(512, 256) / 16, half(512)),
    ),
    "attention": lambda: (
        lambda q, k, v: attention(q, k, v, TRITON),
        tuple(half(2, 300, 12, 128) for _ in range(3)),
    ),
    "cross_attention": lambda: (
        lambda q, k, v, i, n: cross_attention(q, k, v, i, i, TRITON, n),
        (
            *(half(2, 300, 12, 128), *(half(2, 64, 12, 128) for _ in range(2))),
            *(half(2, 257, 12, 128), torch.full((2,), 64, dtype=torch.int32, device="cuda")),
        ),
    ),
}


class Calls(nn.Module):
    """A call as a module; an operator alone would be a graph without constants."""

    def __init__(self, call: Callable[..., object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.call(*inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[arg-type]


def graph_of(name: str) -> Graph:
    call, inputs = CASES[name]()
    module = Calls(call)

    def specs(tensors: tuple[Tensor, ...], kind: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{kind}_{i}", tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for i, t in enumerate(tensors)
        )

    with torch.no_grad():
        outputs = specs(module(*inputs), "y")
    return Graph(
        *("call", "call", "whole", module), specs(inputs, "x"), outputs, {}, lambda _: inputs
    )


@pytest.mark.parametrize("chosen", ["cudnn", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_package(name: str, chosen: str, tmp_path: Path) -> None:
    if chosen == "triton" and name != "attention":
        pytest.skip("has no attention")
    torch.manual_seed(0)
    graph = graph_of(name)
    program = trace(graph, keep_memory=True)
    facts = carry(program, chosen)
    assert facts["carried"]
    path = tmp_path / "call.pt2"
    compile_package(graph, program, path, Machine.here("cuda"), **options())
    runner, inputs = open_aoti(path, "cuda"), graph.examples()
    with torch.no_grad():
        expected = graph.module(*inputs)
    # Both round to bfloat16; sums may run in another order.
    assert largest_error(runner(*inputs), expected) < 1e-2

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        runner(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = runner(*inputs)
    captured.replay()
    assert largest_error(found, expected) < 1e-2
