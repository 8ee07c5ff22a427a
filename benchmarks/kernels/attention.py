"""attention, attention_backward and cross_attention. Providers are named attention backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gen3r_kernels as ops
from benchmarks.kernels.case import (
    EIGHT_BIT_ERROR,
    HALF_ERROR,
    Case,
    Draw,
    Outputs,
    Problem,
    Provider,
    Sizes,
    Unavailable,
    as_tuple,
    call,
    compiled,
    gradients,
)
from benchmarks.timing import dtype_name, shape_name
from gen3r_kernels import ATTENTION_BACKENDS, Backends

BACKENDS = ("reference", "sdpa", "cudnn", "fa2", "fa3", "xformers")
OURS = ("triton", "triton_int8", "triton_fp8")
WITH_BACKWARD = ("reference", "sdpa", "cudnn", "fa2", "xformers", "triton")
CHUNK = 2048  # query rows of the reference at a time: a score matrix of 2048 x 31,850 is 261 MB
LARGEST_SCORES = 2**30  # elements; the reference backend writes the score matrix out


def usable(name: str, q: Tensor, k: Tensor) -> Backends:
    """The backend as a value.

    Raises
    ------
    Unavailable : it is not there, or does not take these tensors.
    """
    backend = ATTENTION_BACKENDS.get(name)
    if backend is None:
        raise Unavailable(f"no attention backend is called '{name}'")
    reason = backend.refusal(q, k)
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if reason is None and name == "reference" and scores > LARGEST_SCORES:
        reason = f"its score matrix would take {4 * scores / 2**30:,.0f} GiB"
    if reason is not None:
        raise Unavailable(reason)
    return Backends(attention=name)


def sampled_heads(x: Tensor) -> list[Tensor]:
    """The first head of the first sample and the last of the last, each [1, S, 1, D]."""
    return [x[:1, :, :1], x[-1:, :, -1:]]


def select(outputs: Any) -> Outputs:
    return tuple(part for x in as_tuple(outputs) for part in sampled_heads(x))


def reference_heads(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """The sampled heads, all rows of them, in float32."""
    outputs = []
    for parts in zip(*(sampled_heads(x) for x in (q, k, v)), strict=True):
        query, key, value = (x.float() for x in parts)
        rows = [ops.attention_reference(chunk, key, value) for chunk in query.split(CHUNK, dim=1)]
        outputs.append(torch.cat(rows, dim=1))
    return tuple(outputs)


def reference_heads_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Outputs:
    """float32 gradients of q, k, v for the sampled heads."""
    found: list[list[Tensor]] = [[], [], []]
    for parts in zip(*(sampled_heads(x) for x in (q, k, v, grad)), strict=True):
        query, key, value, upstream = (x.float() for x in parts)
        key, value = (x.detach().requires_grad_() for x in (key, value))
        rows, key_grad, value_grad = [], torch.zeros_like(key), torch.zeros_like(value)
        for chunk, outer in zip(query.split(CHUNK, 1), upstream.split(CHUNK, 1), strict=True):
            leaf = chunk.detach().requires_grad_()
            with torch.enable_grad():
                out = ops.attention_reference(leaf, key, value)
            row, dk, dv = torch.autograd.grad(out, (leaf, key, value), outer)
            rows.append(row)
            key_grad += dk
            value_grad += dv
        for total, part in zip(found, (torch.cat(rows, 1), key_grad, value_grad), strict=True):
            total.append(part)
    return tuple(part for parts in found for part in parts)


def build_attention(sizes: Sizes, backward: bool, device: torch.device) -> Problem:
    draw = Draw(device)
    shape = (sizes.batch, sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v = (draw.normal(*shape, dtype=sizes.dtype) for _ in range(3))
    grad = draw.normal(*shape, dtype=sizes.dtype) if backward else q

    def make(name: str) -> Callable[[], Provider]:
        def provider() -> Provider:
            backends = usable(name, q, k)
            backend = backends.attention_backend
            if backward and not backend.has_backward:
                raise Unavailable("it has no backward")

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return ops.attention(q, k, v, backends)

            prepare = (
                gradients(run, (q, k, v), (0, 1, 2), [grad]) if backward else call(run, q, k, v)
            )
            return Provider(
                prepare,
                ceiling="bf16" if backend.exact else "fp8",
                compiles=name in OURS,
                max_error=HALF_ERROR if backend.exact else EIGHT_BIT_ERROR,
            )

        return provider

    def reference() -> Outputs:
        return reference_heads_backward(q, k, v, grad) if backward else reference_heads(q, k, v)

    names = WITH_BACKWARD if backward else (*BACKENDS, *OURS)
    return Problem({name: make(name) for name in names}, reference, select)


def build_cross(sizes: Sizes, lengths: tuple[int, ...], device: torch.device) -> Problem:
    """Text keys behind a sample's real tokens are copies of one padding key, as in the model."""
    draw, dtype = Draw(device), sizes.dtype
    rest = (sizes.heads, sizes.head_dim)
    q = draw.normal(sizes.batch, sizes.tokens, *rest, dtype=dtype)
    k_text, v_text = (draw.normal(sizes.batch, sizes.text, *rest, dtype=dtype) for _ in range(2))
    k_image, v_image = (draw.normal(sizes.batch, sizes.image, *rest, dtype=dtype) for _ in range(2))
    for sample, length in enumerate(lengths):
        for x in (k_text, v_text):
            x[sample, length:] = x[sample, length : length + 1].clone()
    keys = (k_text, v_text, k_image, v_image)
    text_lengths = torch.tensor(lengths, device=device, dtype=torch.int32)

    def twice(q: Tensor, backends: Backends) -> Tensor:
        text = ops.attention(q, k_text, v_text, backends)
        return text + ops.attention(q, k_image, v_image, backends)

    def eager(q: Tensor) -> Tensor:
        return twice(q, Backends(attention="sdpa", operators="reference"))

    def ours(q: Tensor) -> Tensor:
        return ops.cross_attention(q, *keys, Backends(), text_lengths=text_lengths)

    def by_backend(name: str) -> Provider:
        return Provider(call(partial(twice, backends=usable(name, q, k_text)), q))

    def reference() -> Outputs:
        text = reference_heads(q, k_text, v_text)
        image = reference_heads(q, k_image, v_image)
        return tuple(a + b for a, b in zip(text, image, strict=True))

    providers: dict[str, Callable[[], Provider]] = {
        "eager": lambda: Provider(call(eager, q)),
        "compile": lambda: Provider(call(compiled(eager), q), compiles=True),
        "cudnn": lambda: by_backend("cudnn"),
        "fa3": lambda: by_backend("fa3"),
        "gen3r": lambda: Provider(call(ours, q), compiles=True),
    }
    return Problem(providers, reference, select)


def cases(sizes: Sizes) -> list[Case]:
    """4 B H S^2 D flops forward, 2.5 times that backward (two products become five)."""
    b, s, h, d = sizes.batch, sizes.tokens, sizes.heads, sizes.head_dim
    flops = 4 * b * h * s * s * d
    tensor = b * s * h * d * sizes.dtype.itemsize
    shape, dtype = shape_name(b, s, h, d), dtype_name(sizes.dtype)
    found = [
        Case(
            *("attention", shape, dtype, (*BACKENDS, *OURS)),
            *(4 * tensor, flops, ("tflops",), partial(build_attention, sizes, False)),
        ),
        Case(
            *("attention_backward", shape, dtype, WITH_BACKWARD),
            # Reads q, k, v, o and the gradient of o; writes three gradients.
            *(8 * tensor, flops * 5 // 2, ("tflops",), partial(build_attention, sizes, True)),
        ),
    ]
    for lengths in (sizes.real_text, (sizes.text,) * b):
        extra = ("compile",) if lengths == sizes.real_text else ()
        # The padding keys of a sample are equal and count once.
        keys = sum(min(n + 1, sizes.text) + sizes.image for n in lengths)
        found.append(
            Case(
                name="cross_attention",
                shape=f"{shape}, text {shape_name(*lengths)} of {sizes.text}, image {sizes.image}",
                dtype=dtype,
                providers=("eager", *extra, "cudnn", "fa3", "gen3r"),
                bytes=2 * tensor + 2 * keys * h * d * sizes.dtype.itemsize,
                flops=4 * h * s * d * keys,
                metrics=("tflops", "gbps"),
                build=partial(build_cross, sizes, lengths),
            )
        )
    return found
