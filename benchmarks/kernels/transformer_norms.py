"""layer_norm_modulate, gated_residual and rms_norm_rope, forward and backward.

`eager` is how upstream writes them: separate PyTorch operators, norms in float32 between casts,
the rotation in complex128. `library` takes PyTorch's own fused norms where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from benchmarks.kernels.case import (
    Case,
    Draw,
    Function,
    Outputs,
    Problem,
    Sizes,
    as_tuple,
    providers_of,
    reference_gradients,
)
from benchmarks.timing import dtype_name, shape_name
from gen3r.rope import rope_table

EPS = 1e-6
NAMES = ("eager", "compile", "library", "gen3r")


def eager_modulate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], None, None, EPS).type_as(x)
    return (normed * (1 + scale) + shift).to(dtype)


def library_modulate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """One fused LayerNorm a sample, with the modulation as its affine part."""
    parts = [
        F.layer_norm(row, row.shape[-1:], 1 + gain[0], offset[0], EPS)
        for row, gain, offset in zip(x, scale, shift, strict=True)
    ]
    return torch.stack(parts).to(dtype)


def eager_gated(
    stream: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    stream = stream + y * gate
    return stream, eager_modulate(stream, scale, shift, y.dtype)


def library_gated(
    stream: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    stream = torch.addcmul(stream, y.float(), gate)
    return stream, library_modulate(stream, scale, shift, y.dtype)


def eager_rope(
    x: Tensor, weight: Tensor, turns: Tensor, heads: int
) -> Tensor:  # turns [S, 1, D / 2] complex128
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * weight
    pairs = torch.view_as_complex(normed.double().unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def library_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weight, EPS).float()
    even, odd = normed.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


Made = tuple[dict[str, Function], Function, list[Any]]  # functions, reference, arguments


def make_modulate(sizes: Sizes, draw: Draw) -> Made:
    shape = (sizes.batch, sizes.tokens, sizes.width)
    x = draw.normal(*shape, dtype=torch.float32)
    scale, shift = (
        draw.normal(sizes.batch, 1, sizes.width, dtype=torch.float32, scale=0.3) for _ in range(2)
    )
    functions: dict[str, Function] = {
        "eager": partial(eager_modulate, dtype=sizes.dtype),
        "library": partial(library_modulate, dtype=sizes.dtype),
        "gen3r": partial(ops.layer_norm_modulate, out_dtype=sizes.dtype, eps=EPS),
    }
    return functions, partial(ops.layer_norm_modulate_reference, eps=EPS), [x, scale, shift]


def make_gated(sizes: Sizes, draw: Draw) -> Made:
    shape = (sizes.batch, sizes.tokens, sizes.width)
    stream = draw.normal(*shape, dtype=torch.float32)
    y = draw.normal(*shape, dtype=sizes.dtype)
    tables = [
        draw.normal(sizes.batch, 1, sizes.width, dtype=torch.float32, scale=0.3) for _ in range(3)
    ]
    functions: dict[str, Function] = {
        "eager": eager_gated,
        "library": library_gated,
        "gen3r": partial(ops.gated_residual, out_dtype=sizes.dtype, eps=EPS),
    }
    return functions, partial(ops.gated_residual_reference, eps=EPS), [stream, y, *tables]


def make_rope(sizes: Sizes, draw: Draw) -> Made:
    shape, heads = (sizes.batch, sizes.tokens, sizes.width), sizes.heads
    q, k = (draw.normal(*shape, dtype=sizes.dtype) for _ in range(2))
    weights = [draw.normal(sizes.width, dtype=sizes.dtype, scale=0.1).add_(1) for _ in range(2)]
    cos, sin = rope_table(sizes.grid, sizes.head_dim, True, draw.device)
    turns = torch.complex(cos.double(), sin.double())[:, None]

    def eager(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Outputs:
        return eager_rope(q, wq, turns, heads), eager_rope(k, wk, turns, heads)

    def library(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Outputs:
        return library_rope(q, wq, cos, sin, heads), library_rope(k, wk, cos, sin, heads)

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Outputs:
        return ops.rms_norm_rope(q, k, wq, wk, cos, sin, num_heads=heads, eps=EPS)

    def reference(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> Outputs:
        one = ops.rms_norm_rope_reference
        return one(q, wq, cos, sin, heads, EPS), one(k, wk, cos, sin, heads, EPS)

    return {"eager": eager, "library": library, "gen3r": ours}, reference, [q, k, *weights]


def build(
    make: Callable[[Sizes, Draw], Made],
    sizes: Sizes,
    out_dtypes: Sequence[torch.dtype],
    backward: bool,
    device: torch.device,
) -> Problem:
    """Forward: outputs. Backward: gradients of every argument, given gradients of the outputs."""
    draw = Draw(device)
    functions, reference, args = make(sizes, draw)
    if not backward:
        return Problem(providers_of(functions, {"": args}), lambda: as_tuple(reference(*args)))
    # Gradients of the outputs have the outputs' shapes; those of rms_norm_rope are split in heads.
    shape = (sizes.batch, sizes.tokens, sizes.width)
    if make is make_rope:
        shape = (*shape[:2], sizes.heads, sizes.head_dim)  # type: ignore[assignment]
    grads = [draw.normal(*shape, dtype=dtype) for dtype in out_dtypes]
    wrt = range(len(args))
    return Problem(
        providers_of(functions, {"": args}, wrt, grads),
        lambda: reference_gradients(reference, args, wrt, grads),
    )


def cases(sizes: Sizes) -> list[Case]:
    """Bytes per element of the [B, S, C] stream: float32 4, the model's dtype `half`."""
    elements = sizes.batch * sizes.tokens * sizes.width
    half, wide = sizes.dtype.itemsize, 4
    shape = shape_name(sizes.batch, sizes.tokens, sizes.width)
    name, both = dtype_name(sizes.dtype), f"float32->{dtype_name(sizes.dtype)}"
    table = [
        # operator, maker, dtype, output dtypes, bytes and flops forward, bytes and flops backward
        # Backward reads x and dy, writes dx.
        (
            *("layer_norm_modulate", make_modulate, both, (sizes.dtype,)),
            *(wide + half, 9, wide + half + wide, 20),
        ),
        # Forward reads stream and y, writes both outputs. Backward reads the new stream, y and two
        # gradients, writes two gradients.
        (
            *("gated_residual", make_gated, both, (torch.float32, sizes.dtype)),
            *(2 * wide + 2 * half, 11, 3 * wide + 3 * half, 24),
        ),
        # q and k: each is read and written; backward reads x and dy, writes dx.
        (
            *("rms_norm_rope", make_rope, name, (sizes.dtype, sizes.dtype)),
            *(4 * half, 14, 6 * half, 30),
        ),
    ]
    found = []
    for op, make, dtype, outs, forward_bytes, forward_flops, back_bytes, back_flops in table:
        for backward in (False, True):
            found.append(
                Case(
                    name=f"{op}_backward" if backward else op,
                    shape=f"2 of {shape}" if make is make_rope else shape,
                    dtype=dtype,
                    providers=NAMES,
                    bytes=elements * (back_bytes if backward else forward_bytes),
                    flops=elements * (back_flops if backward else forward_flops),
                    metrics=("gbps",),
                    build=partial(build, make, sizes, outs, backward),
                )
            )
    return found
