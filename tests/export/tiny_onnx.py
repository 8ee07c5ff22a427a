"""Tiny ONNX files for the tests of TensorRT: what a decoder is made of, in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from gen3r_export.config import PRECISIONS
from gen3r_export.graph import DTYPES, DimRange, Graph, TensorSpec

FLOATS = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT16,  # activations; the products are quantised
}
CHANNELS = 16


def _constant(name: str, values: np.ndarray, element: int) -> onnx.TensorProto:
    cast = values.astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(cast, name)


class _Network:
    """Nodes and constants of a graph in one element type."""

    def __init__(self, precision: str) -> None:
        self.element = FLOATS[precision]
        self.quantised = precision == "fp8"
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def add(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: np.ndarray, element: int | None = None) -> str:
        self.constants.append(_constant(name, values, element or self.element))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.standard_normal(shape) * 0.1)

    def eight_bits(self, name: str) -> str:
        """`name` through QuantizeLinear and DequantizeLinear where this is the fp8 graph."""
        if not self.quantised:
            return name
        scale = self.constant(f"{name}_scale", np.array(0.01))
        zero = self.constant(f"{name}_zero", np.array(0.0), TensorProto.FLOAT8E4M3FN)
        small = self.add("QuantizeLinear", [name, scale, zero], f"{name}_q")
        return self.add("DequantizeLinear", [small, scale, zero], f"{name}_dq")


def tiny_onnx(
    path: Path,
    precision: str = "fp16",
    *,
    dynamic: bool = False,
    wide_convolution: bool = False,
) -> Path:
    """Writes convolution, SiLU, convolution and a product of matrices: x [N, 16, F, 8, 8] -> y of
    the same shape.

    Parameters
    ----------
    dynamic : N is "batch" and F is "4*frames"; else 1 and 4.
    wide_convolution : the second convolution is in float32, between casts.
    """
    net = _Network(precision)
    shape = ["batch" if dynamic else 1, CHANNELS, "4*frames" if dynamic else 4, 8, 8]
    kernel = {"kernel_shape": [3, 3, 3], "pads": [1] * 6}
    first = net.weight("first_weight", CHANNELS, CHANNELS, 3, 3, 3)
    x = net.add("Conv", [net.eight_bits("x"), net.eight_bits(first)], "first", **kernel)
    x = net.add("Mul", [x, net.add("Sigmoid", [x], "gate")], "silu")
    if wide_convolution:
        x = net.add("Cast", [x], "widen", to=TensorProto.FLOAT)
        values = net.random.standard_normal((CHANNELS, CHANNELS, 3, 3, 3))
        kernel_weight = net.constant("second_weight", values, TensorProto.FLOAT)
        x = net.add("Conv", [x, kernel_weight], "second", **kernel)
        x = net.add("Cast", [x], "narrow", to=net.element)
    else:
        second = net.weight("second_weight", CHANNELS, CHANNELS, 3, 3, 3)
        x = net.add("Conv", [net.eight_bits(x), net.eight_bits(second)], "second", **kernel)
    matrix = net.weight("matrix", 8, 8)
    net.add("MatMul", [net.eight_bits(x), net.eight_bits(matrix)], "y")
    graph = helper.make_graph(
        net.nodes,
        path.stem,
        [helper.make_tensor_value_info("x", net.element, shape)],
        [helper.make_tensor_value_info("y", net.element, shape)],
        net.constants,
    )
    opset = 22 if precision == "bf16" else 20  # Conv of bf16 is in ONNX since 22
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


class _Same(nn.Module):
    """Of zeros it gives what the file gives."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def tiny_graph(precision: str = "fp16", *, dynamic: bool = False) -> Graph:
    """What the file of `tiny_onnx` was exported from, but for the module."""
    shape = ("batch" if dynamic else 1, CHANNELS, "4*frames" if dynamic else 4, 8, 8)
    dtype = PRECISIONS[precision]
    dims = {"batch": DimRange(1, 2, 4), "frames": DimRange(1, 2, 3)} if dynamic else {}
    spec = TensorSpec("x", shape, dtype)
    return Graph(
        name="tiny",
        part="tiny",
        form="whole",
        module=_Same(),
        inputs=(spec,),
        outputs=(TensorSpec("y", shape, dtype),),
        dims=dims,
        example=lambda lengths: (torch.zeros(spec.sizes(lengths), dtype=DTYPES[dtype]),),
    )
