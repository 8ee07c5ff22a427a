# mypy: allow-untyped-defs, allow-incomplete-defs
"""y = gelu_tanh(x + b) behind a matrix product, and its backward with the bias' gradient.

gelu_tanh(z) = z s, s = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3);
its derivative is s + 2 z s (1 - s) sqrt(2 / pi) (1 + 3 * 0.044715 z^2).

For training alone: inference has bias and GELU in the product's epilogue (`linear`). Bytes at
[31850, 8960] bf16: forward 1.14 GB, 0.40 ms at the 2.86 TB/s that a copy reaches on an H100;
backward 1.71 GB, 0.60 ms, which includes the sum over rows that is the bias' gradient: PyTorch
reads the 0.57 GB again for that (0.55 ms before it, from a profile). The kernels were timed inside
a training step only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton

ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBE = tl.constexpr(0.044715)


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = (lines < rows)[:, None] & (columns < width)[None, :]
    places = lines[:, None] * width + columns[None, :]
    bias = tl.load(bias_ptr + columns, columns < width, 0.0).to(tl.float32)
    z = tl.load(x_ptr + places, inside, 0.0).to(tl.float32) + bias[None, :]
    y = z / (1 + tl.exp((z + z * z * z * CUBE) * -2 * ROOT))
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    out_ptr,  # gradient of x
    parts_ptr,  # [programs, width] float32: sums over a program's rows
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + columns, columns < width, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * BLOCK_M
        lines = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (lines < rows)[:, None] & (columns < width)[None, :]
        places = lines[:, None] * width + columns[None, :]
        z = tl.load(x_ptr + places, inside, 0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + places, inside, 0.0).to(tl.float32)
        s = 1 / (1 + tl.exp((z + z * z * z * CUBE) * -2 * ROOT))
        grad *= s + z * s * (1 - s) * 2 * ROOT * (1 + z * z * 3 * CUBE)
        tl.store(out_ptr + places, grad.to(out_ptr.dtype.element_ty), inside)
        total += tl.sum(grad, 0)
    tl.store(parts_ptr + tl.program_id(0) * width + columns, total, columns < width)


@dataclass(frozen=True)
class BiasGeluConfig:
    """A tile of rows and columns, the tiles of rows that a backward program walks over, warps."""

    block_m: int = 8
    block_n: int = 256
    steps: int = 32
    num_warps: int = 4

    @classmethod
    def for_shape(cls, rows: int, width: int) -> BiasGeluConfig:
        """Enough programs for every multiprocessor where there are few rows."""
        return cls(steps=max(1, min(32, rows // 512)))


@operator("bias_gelu")
def _bias_gelu_op(
    x: Tensor,  # [M, N]
    bias: Tensor,  # [N]
) -> Tensor:  # [M, N]
    y = torch.empty_like(x)
    rows, width = x.shape
    config = BiasGeluConfig.for_shape(rows, width)
    grid = (triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n))
    if x.numel() > 0:
        launch(_forward_kernel)[grid](
            *(x, bias, y, rows, width),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return y


@_bias_gelu_op.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gen3r::bias_gelu_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    config = BiasGeluConfig.for_shape(rows, width)
    programs = triton.cdiv(rows, config.block_m * config.steps)
    out = torch.empty_like(x)
    parts = x.new_zeros((programs, width), dtype=torch.float32)
    if x.numel() > 0:
        _backward_kernel[(programs, triton.cdiv(width, config.block_n))](
            *(grad.contiguous(), x, bias, out, parts, rows, width),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STEPS=config.steps,
            num_warps=config.num_warps,
        )
    return out, parts.sum(0).to(bias.dtype)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_bias = _backward_op(grad, *ctx.saved_tensors)
    return of_x, of_bias


_bias_gelu_op.register_autograd(_backward, setup_context=_setup)


def bias_gelu_reference(
    x: Tensor,  # [..., N]
    bias: Tensor,  # [N]
) -> Tensor:  # [..., N] float32
    """The definition in float32."""
    return F.gelu(x.float() + bias.float(), approximate="tanh")


def bias_gelu(
    x: Tensor,  # [..., N], contiguous
    bias: Tensor,  # [N]
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [..., N], dtype of x
    """gelu_tanh(x + bias).

    Raises
    ------
    ValueError : a bias that does not fit, or an x that is not contiguous where the kernel runs.
    """
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: bias {list(bias.shape)} does not fit x {list(x.shape)}")
    if not use_triton("bias_gelu", x, x.dtype, backends):
        return F.gelu(x + bias, approximate="tanh")
    if not x.is_contiguous():
        raise ValueError(
            f"bias_gelu: x {list(x.shape)} with strides {x.stride()} is not contiguous; "
            "call .contiguous() or use operators='reference'"
        )
    return _bias_gelu_op(x.view(-1, x.shape[-1]), bias).view(x.shape)


def compile_cases() -> list[CompileCase]:
    """The feed-forward layer's size in bf16."""
    config = BiasGeluConfig.for_shape(31_850, 8960)
    halves = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "grad_ptr", "out_ptr"), "*bf16")
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    cases = []
    for name, kernel, extra in (
        ("forward", _forward_kernel, {}),
        ("backward", _backward_kernel, {"STEPS": config.steps}),
    ):
        signature = {}
        for argument in kernel.arg_names:
            if argument not in (*sizes, "STEPS"):
                signature[argument] = halves.get(argument, "i32")
        if name == "backward":
            signature["parts_ptr"] = "*fp32"
        pointers = tuple(n for n in signature if n.endswith("_ptr"))
        cases.append(
            CompileCase(
                f"bias-gelu-{name}",
                kernel,
                signature,
                {**sizes, **extra},
                {"num_warps": config.num_warps},
                (*pointers, "width"),
            )
        )
    return cases
