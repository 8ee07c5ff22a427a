"""Linear layers: y = x w^T + b, optionally y = gelu_tanh(x w^T + b), in bf16 or in 8 bits.

gelu_tanh(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))).

FLOPs at M = 63,700 tokens: 2 M K N. K = N = 1536: 0.30 TFLOP, 0.40 ms at the 746 TFLOP/s that an
H100 holds in bf16 and 0.22 ms at 1,388 in fp8. 1536 x 8960: 1.75 TFLOP, 2.35 ms and 1.26 ms.

In bf16 the product runs in cuBLASLt with the bias, or the bias and tanh-GELU, in its epilogue: no
pass over the output [63700, 8960] (1.1 GB each way). Measured on an H100 at M = 63,700 with bias,
ms (TFLOP/s): 1536 -> 1536 0.442 (679), 1536 -> 4608 1.353 (666: q, k and v lose nothing apart),
1536 -> 8960 with GELU 2.669 (657; F.linear and F.gelu 3.800), 8960 -> 1536 2.491 (704). The 8-bit
twin, taking a `Quantized` x and a `QuantizedWeight`, is in `linear_fp8.py`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.bias_gelu import bias_gelu
from gen3r_kernels.carried import operator
from gen3r_kernels.dispatch import FLOAT8, use_triton
from gen3r_kernels.linear_fp8 import linear_fp8
from gen3r_kernels.quantize import QuantizedWeight, quantize
from gen3r_kernels.quantized import Quantized

Activation = Literal["gelu_tanh"] | None
ACTIVATIONS = (None, "gelu_tanh")


@operator("linear_gelu")
def _linear_gelu_op(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor,  # [N]
) -> Tensor:  # [M, N]
    """An opaque operator, so that torch.compile does not take the epilogue apart again.

    It has no derivative: that would have to compute the pre-activation again, one more product
    (1.2 ms at 31,850 x 1536 x 8960 on an H100) where writing and reading it takes 0.4.
    """
    if x.is_cuda:
        # ATen asks cuBLASLt for the GELU_BIAS epilogue, whose GELU is the tanh form.
        return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@_linear_gelu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def linear_reference(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    activation: Activation = None,
) -> Tensor:  # [..., N] float32
    """The definition in float32."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y if activation is None else F.gelu(y, approximate="tanh")


@overload
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    out_dtype: None = None,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor: ...


@overload
def linear(
    x: Tensor | Quantized,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    out_dtype: torch.dtype | None = None,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor | Quantized: ...


def linear(
    x: Tensor | Quantized,  # [..., K]
    weight: Tensor | QuantizedWeight,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    activation: Activation = None,
    out_dtype: torch.dtype | None = None,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor | Quantized:  # [..., N]
    """x w^T + bias, then the activation.

    Parameters
    ----------
    x, weight : both plain, of one dtype, or both in 8 bits (`quantize`, `quantize_weight`).
    activation : None or "gelu_tanh".
    out_dtype : None means x's dtype, or bfloat16 for 8-bit operands. float8_e4m3fn gives a
        `Quantized` result; of 8-bit operands it leaves the epilogue in 8 bits.

    Raises
    ------
    ValueError : an unknown activation, one operand in 8 bits and the other not, shapes that do not
        fit, or gradients asked of 8-bit operands.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is unknown; known: {ACTIVATIONS}")
    if isinstance(x, Quantized):
        if not isinstance(weight, QuantizedWeight):
            raise ValueError("linear: x is in 8 bits, weight is not; use quantize_weight(weight)")
        dtype = out_dtype or torch.bfloat16
        return linear_fp8(x, weight, bias, activation is not None, dtype, backends)
    if isinstance(weight, QuantizedWeight):
        raise ValueError("linear: weight is in 8 bits, x is not; use quantize(x)")
    if x.shape[-1] != weight.shape[-1] or x.dtype != weight.dtype:
        raise ValueError(
            f"linear: x {list(x.shape)} {x.dtype} does not fit weight {list(weight.shape)} "
            f"{weight.dtype}; they must share the last dimension and the dtype"
        )
    y = _linear(x, weight, bias, activation, backends)
    if out_dtype is None or out_dtype == y.dtype:
        return y
    return quantize(y, backends=backends) if out_dtype == FLOAT8 else y.to(out_dtype)


def _linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    activation: Activation,
    backends: Backends,
) -> Tensor:  # [..., N]
    fused = use_triton("linear", x, x.dtype, backends)
    if activation is None:
        return F.linear(x, weight, bias)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    if not fused or (recorded and bias is None):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if recorded and bias is not None:
        return bias_gelu(F.linear(x, weight), bias, backends=backends)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    y = _linear_gelu_op(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
