"""Products of 8 bits in an ONNX graph of fp16: Q/DQ nodes around convolutions and linear layers.

    x -> QuantizeLinear -> DequantizeLinear -> Conv | MatMul | Gemm
    weight (float8, stored so) -> DequantizeLinear ---^

A scale is the largest magnitude over 448, the largest of float8_e4m3fn: of the weights per output
channel, of the activations per tensor, measured by running the graph on its examples. The values
that the products see are the rounded ones, so that whoever runs the graph, in 8 bits or not, gets
the same numbers up to the order of its sums.

Scales are fp16, as the opset wants it of fp16 tensors. Below 2^-14 fp16 loses digits; a scale is
not made smaller, which costs a float8 nothing but its smallest subnormals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gen3r_export.graph import Graph
from gen3r_export.onnx_runner import open_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 448.0  # of float8_e4m3fn
LEAST_SCALE = 2.0**-14
# The first product of a graph reads what users give and the last one makes what they see: both are
# a small part of the arithmetic, and their rounding is not averaged by what follows.
KEEP_ENDS = True
UNIT = 16  # tensor cores take so many bytes of a row at once: other widths stay fp16


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer with a constant weight; axis: of its output channels."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    axis: int


def products(model: ir.Model) -> list[Product]:
    """What is to be computed in 8 bits, in the graph's order."""
    found = list(_weighted(model))
    ends = {found[0].weight, found[-1].weight} if found and KEEP_ENDS else set()
    return [product for product in found if product.weight not in ends and _fits(product)]


def _weighted(model: ir.Model) -> Iterator[Product]:
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain != "":
            continue
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None or not weight.is_initializer():
            continue
        shape = weight.shape
        if shape is None or len(shape) < 2 or (node.op_type != "Conv" and len(shape) != 2):
            continue
        transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        yield Product(node, x, weight, 0 if node.op_type == "Conv" or transposed else 1)


def _fits(product: Product) -> bool:
    array = _array(product.weight)
    rows, columns = array.shape[product.axis], array.shape[1 - product.axis]
    return array.dtype == np.float16 and rows % UNIT == 0 and columns % UNIT == 0


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None  # an initializer
    return value.const_value.numpy()


def calibrated_scales(model: ir.Model, graph: Graph, folder: Path) -> dict[str, float]:
    """The scale of each activation that a product reads, by name.

    The graph runs in onnxruntime on its examples, with the largest magnitudes as outputs; the model
    is as before afterwards.

    Raises
    ------
    ValueError : an activation that is not finite.
    """
    import onnx_ir as ir

    names = list(dict.fromkeys(str(product.x.name) for product in products(model)))
    values = {str(product.x.name): product.x for product in products(model)}
    count = len(model.graph.outputs)
    added: list[ir.Node] = []
    for name in names:
        size = ir.node("Abs", [values[name]])
        peak = ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0})
        peak.outputs[0].name = f"{name}_peak"
        peak.outputs[0].type, peak.outputs[0].shape = (
            ir.TensorType(ir.DataType.FLOAT16),
            ir.Shape(()),
        )
        added += [size, peak]
        model.graph.outputs.append(peak.outputs[0])
    model.graph.extend(added)
    peaks = torch.zeros(len(names))
    with TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "calibration.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        runner = open_onnx(path)
        for which in ("least", "best"):
            found = runner(*(x.cpu() for x in graph.examples(which)))
            if names:
                peaks = torch.maximum(peaks, torch.stack(found[count:]).float())
        del runner
    del model.graph.outputs[count:]
    model.graph.remove(added, safe=True)
    for name, peak_value in zip(names, peaks.tolist(), strict=True):
        if not np.isfinite(peak_value):
            raise ValueError(
                f"{graph.name}: '{name}' overflows fp16 on the example, so that it has no scale; "
                "export it in bf16"
            )
    return {n: _scale(peak) for n, peak in zip(names, peaks.tolist(), strict=True)}


def _scale(peak: Any) -> Any:
    """peak / 448 as fp16, not rounded down; a number, or an array of them."""
    exact = np.maximum(np.asarray(peak, dtype=np.float64) / LARGEST, LEAST_SCALE)
    near = exact.astype(np.float16)
    near = np.where(near < exact, np.nextafter(near, np.float16(np.inf)), near)
    return near.astype(np.float16)


def quantise(model: ir.Model, scales: Mapping[str, Any]) -> dict[str, int]:
    """Put Q/DQ nodes around every product in place; how many are in 8 bits and how many are not.

    scales : of the activations, from `calibrated_scales`.

    Raises
    ------
    ValueError : no product that 8 bits are for.
    """
    import onnx_ir as ir

    chosen = products(model)
    if not chosen:
        raise ValueError(
            f"{model.graph.name} has no product of widths that are multiples of {UNIT} between its "
            "first and its last; export it in fp16"
        )
    total = sum(1 for _ in _weighted(model))
    zero = _initializer(model, "float8_zero", _float8(np.zeros(())))
    rounded: dict[str, ir.Value] = {}
    weights: dict[str, ir.Value] = {}
    for product in chosen:
        name, weight = str(product.x.name), product.weight
        if name not in rounded:
            scale = _initializer(model, f"{name}_scale", np.asarray(scales[name], np.float16))
            to8 = ir.node("QuantizeLinear", [product.x, scale, zero])
            back = ir.node("DequantizeLinear", [to8.outputs[0], scale, zero])
            model.graph.insert_before(product.node, [to8, back])
            rounded[name] = back.outputs[0]
        if str(weight.name) not in weights:
            weights[str(weight.name)] = _weight(model, product)
        product.node.replace_input_with(0, rounded[name])
        product.node.replace_input_with(1, weights[str(weight.name)])
    for name in weights:
        value = model.graph.initializers[name]
        if not value.uses():
            del model.graph.initializers[name]
    return {"products_fp8": len(chosen), "products_fp16": total - len(chosen)}


def _weight(model: ir.Model, product: Product) -> ir.Value:
    """The weight in float8 with a scale per output channel, and the node that widens it."""
    import onnx_ir as ir

    wide = _array(product.weight).astype(np.float32)
    others = tuple(axis for axis in range(wide.ndim) if axis != product.axis)
    scale = _scale(np.abs(wide).max(axis=others))
    shape = [1] * wide.ndim
    shape[product.axis] = -1
    name = str(product.weight.name)
    narrow = _initializer(
        model, f"{name}_fp8", _float8(wide / scale.astype(np.float32).reshape(shape))
    )
    kept = _initializer(model, f"{name}_scale", scale)
    node = ir.node("DequantizeLinear", [narrow, kept], attributes={"axis": product.axis})
    model.graph.insert_before(product.node, [node])
    return node.outputs[0]


def _float8(array: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return np.clip(array, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
