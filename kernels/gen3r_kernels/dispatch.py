"""Which implementation an operator takes, and what the compile test needs to know of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from gen3r_kernels.backends import Backends

# Triton decides at import whether kernels are interpreted; the flag only tells what it decided.
INTERPRETED: bool = triton.knobs.runtime.interpret

FLOAT8 = torch.float8_e4m3fn
REDUCED = (torch.bfloat16, torch.float16, FLOAT8, torch.int8)


def use_triton(
    op: str,
    x: Tensor,
    out_dtype: torch.dtype,
    backends: Backends,
    *,
    any_dtype: bool = False,
) -> bool:
    """Whether `op` runs its Triton kernel for input `x` and outputs of `out_dtype`.

    any_dtype: the operator computes in float32 whatever the model's dtype (solver step,
    unprojection), so that "auto" takes the kernel for float32 on a GPU as well.

    Raises
    ------
    ValueError : `operators="triton"` for a tensor that no Triton kernel can run on.
    """
    if backends.operators == "reference":
        return False
    if backends.operators == "triton":
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(
                f"{op}: operators='triton' needs CUDA tensors, got one on {x.device}; "
                "use operators='auto'"
            )
        if x.dtype == torch.float64:
            raise ValueError(
                f"{op}: operators='triton' takes up to float32, got float64; "
                "use operators='reference'"
            )
        return True
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    return any_dtype or out_dtype in REDUCED


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one launch configuration, to be compiled without a GPU.

    Parameters
    ----------
    name : shown when it fails.
    kernel : the function under ``@triton.jit`` (or ``@gluon.jit``).
    signature : argument name to Triton type, e.g. "*bf16", "i32", "fp32".
    constexprs : argument name to value.
    options : num_warps, num_stages and the like.
    divisible : arguments that are multiples of 16 (aligned pointers, widths).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    gluon: bool = False
