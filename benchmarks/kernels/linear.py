"""linear_qkv, linear_o, linear_ffn1, linear_ffn2, and linear_layer: all linears of one layer.

`bf16` and `fp8` are ours, with the three projections of one input as one product. `fp8` quantises
its inputs inside the measured time; only ffn2 takes its input in 8 bits, from ffn1's epilogue.
`fp8_from_norm` is given in 8 bits what a norm's pass can write in 8 bits: the inputs of q, k, v, of
cross-attention's q and of ffn1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from benchmarks.kernels.case import (
    EIGHT_BIT_ERROR,
    Case,
    Draw,
    Outputs,
    Problem,
    Provider,
    Sizes,
    Unavailable,
    call,
    compiled,
)
from benchmarks.timing import dtype_name, shape_name
from gen3r_kernels.quantized import Quantized

FLOAT8 = torch.float8_e4m3fn
SAMPLE = 1024  # rows at either end that are compared with the reference


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    source : the layer whose output it reads, "" for an input of its own
    from_norm : its input is the output of a norm
    parts : projections of one input that upstream computes one by one
    """

    name: str
    inputs: int
    outputs: int
    gelu: bool = False
    source: str = ""
    from_norm: bool = False
    parts: int = 1


def layer(sizes: Sizes) -> tuple[Linear, ...]:
    """The linears of one block whose inputs are all tokens (text and image keys are constant)."""
    c, wide = sizes.width, sizes.ffn
    return (
        Linear("qkv", c, 3 * c, from_norm=True, parts=3),
        Linear("o", c, c),
        Linear("cross_q", c, c, from_norm=True),
        Linear("cross_o", c, c),
        Linear("ffn1", c, wide, gelu=True, from_norm=True),
        Linear("ffn2", wide, c, source="ffn1"),
    )


@dataclass(frozen=True)
class Tensors:
    """Inputs, weights and biases by the name of the linear."""

    x: Mapping[str, Any]
    weight: Mapping[str, Any]
    bias: Mapping[str, Tensor]


def run_eager(linears: tuple[Linear, ...], tensors: Tensors) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for linear in linears:
        x = outputs[linear.source] if linear.source in outputs else tensors.x[linear.name]
        weights = tensors.weight[linear.name].chunk(linear.parts)
        biases = tensors.bias[linear.name].chunk(linear.parts)
        parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        if linear.gelu:
            parts = [F.gelu(part, approximate="tanh") for part in parts]
        outputs[linear.name] = parts[0] if linear.parts == 1 else parts
    return outputs


def run_ours(linears: tuple[Linear, ...], tensors: Tensors, eight_bit: bool) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for linear in linears:
        x = outputs[linear.source] if linear.source in outputs else tensors.x[linear.name]
        if eight_bit and isinstance(x, Tensor):
            x = ops.quantize(x)
        outputs[linear.name] = ops.linear(
            x,
            tensors.weight[linear.name],
            tensors.bias[linear.name],
            activation="gelu_tanh" if linear.gelu else None,
            # Between ffn1 and ffn2 the 8-bit twin stays in 8 bits.
            out_dtype=FLOAT8 if eight_bit and linear.gelu else None,
        )
    return outputs


def run_reference(
    linears: tuple[Linear, ...], tensors: Tensors, rows: Callable[[Tensor], Tensor]
) -> Outputs:
    outputs: dict[str, Tensor] = {}
    for linear in linears:
        x = outputs[linear.source] if linear.source in outputs else rows(tensors.x[linear.name])
        activation: Any = "gelu_tanh" if linear.gelu else None
        weight, bias = tensors.weight[linear.name], tensors.bias[linear.name]
        outputs[linear.name] = ops.linear_reference(x, weight, bias, activation)
    return tuple(outputs.values())


def sampled_rows(x: Tensor | Quantized) -> Tensor:
    if isinstance(x, Quantized):
        return ops.dequantize(Quantized(*map(sampled_rows, x)))
    return torch.cat([x[:SAMPLE], x[-SAMPLE:]]) if x.shape[0] > 2 * SAMPLE else x


def flat(outputs: Sequence[Any]) -> list[Tensor | Quantized]:
    """The outputs of all linears, q, k and v one by one."""
    found: list[Tensor | Quantized] = []
    for output in outputs:
        found += output if isinstance(output, list) else [output]
    return found


def build(linears: tuple[Linear, ...], sizes: Sizes, device: torch.device) -> Problem:
    draw, dtype = Draw(device), sizes.dtype
    rows = sizes.batch * sizes.tokens
    plain = Tensors(
        x={
            n.name: draw.normal(rows, n.inputs, dtype=dtype)
            for n in linears
            if needs_input(n, linears)
        },
        weight={
            n.name: draw.normal(n.outputs, n.inputs, dtype=dtype, scale=n.inputs**-0.5)
            for n in linears
        },
        bias={n.name: draw.normal(n.outputs, dtype=dtype, scale=0.1) for n in linears},
    )

    def eager(tensors: Tensors) -> Any:
        return tuple(run_eager(linears, tensors).values())

    def in_bf16() -> Provider:
        return Provider(
            call(lambda: tuple(run_ours(linears, plain, False).values())), compiles=True
        )

    def in_fp8(from_norm: bool) -> Provider:
        if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
            raise Unavailable("8-bit products need a CUDA GPU of compute capability 8.9 or newer")
        weight = {name: ops.quantize_weight(w) for name, w in plain.weight.items()}
        given = {n.name for n in linears if n.source or (from_norm and n.from_norm)}
        x = {name: ops.quantize(v) if name in given else v for name, v in plain.x.items()}
        own = Tensors(x, weight, plain.bias)
        return Provider(
            call(lambda: tuple(run_ours(linears, own, True).values())),
            ceiling="fp8",
            compiles=True,
            max_error=EIGHT_BIT_ERROR,
            config={"given_in_8_bits": sorted(given & set(x))},
        )

    def split(outputs: Outputs) -> Outputs:
        """Every output in pieces of the model's width, so that q, k and v count apart."""
        return tuple(part for x in outputs for part in x.split(sizes.width, dim=-1))

    providers: dict[str, Callable[[], Provider]] = {
        "eager": lambda: Provider(call(eager, plain)),
        "compile": lambda: Provider(call(compiled(eager), plain), compiles=True),
        "bf16": in_bf16,
        "fp8": lambda: in_fp8(False),
        "fp8_from_norm": lambda: in_fp8(True),
    }
    return Problem(
        providers,
        lambda: split(run_reference(linears, plain, sampled_rows)),
        lambda outputs: split(tuple(sampled_rows(x) for x in flat(outputs))),
    )


def needs_input(linear: Linear, linears: tuple[Linear, ...]) -> bool:
    return linear.source not in {other.name for other in linears}


def cases(sizes: Sizes) -> list[Case]:
    rows, item, found = sizes.batch * sizes.tokens, sizes.dtype.itemsize, []
    whole = layer(sizes)
    groups = {
        **{f"linear_{n.name}": (n,) for n in whole if not n.name.startswith("cross")},
        "linear_layer": whole,
    }
    for name, linears in groups.items():
        # torch.compile can only fuse the GELU: it is tried on the whole layer.
        compiled_too = ["compile"] if name == "linear_layer" else []
        providers = ["eager", *compiled_too, "bf16", "fp8"]
        if any(n.from_norm for n in linears):
            providers.append("fp8_from_norm")
        sizes_text = f"{linears[0].inputs}->{linears[0].outputs}" if len(linears) == 1 else "layer"
        found.append(
            Case(
                name=name,
                shape=f"{shape_name(rows)} {sizes_text}",
                dtype=dtype_name(sizes.dtype),
                providers=tuple(providers),
                bytes=sum(
                    item * (rows * (n.inputs + n.outputs) + n.inputs * n.outputs + n.outputs)
                    for n in linears
                ),
                flops=sum(2 * rows * n.inputs * n.outputs for n in linears),
                metrics=("tflops",),
                build=partial(build, linears, sizes),
            )
        )
    return found
