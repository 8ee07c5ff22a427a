"""What TensorRT made of an ONNX file's network: its layers, their types, and its casts.

A network is strongly typed, so a float32 island in a half graph is one that the ONNX file has; what
is checked is that convolutions and products are not in it and that TensorRT's parser added none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gen3r_export.onnx_runner import need

FLOATS = ("float", "half", "bf16", "fp8")
# Element type of products by precision. In fp8 the network multiplies in half what Q/DQ pairs
# rounded; the compiler merges the pairs into products of 8 bits.
PRODUCT_TYPE = {"fp32": "float", "fp16": "half", "bf16": "bf16", "fp8": "half"}
PRODUCTS = ("convolution", "deconvolution", "matrix_multiply", "einsum")
# Layers that only move values: what was quantised before them is so behind them.
MOVES = ("shuffle", "identity", "squeeze", "unsqueeze", "slice")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Inspection:
    """The layers of a parsed network.

    Parameters
    ----------
    layers : number of layers by kind.
    tensors : number of layer outputs by element type.
    casts : number of casts between floating-point types, by ``from->to``.
    unexpected_casts : those of them that no Cast node of the ONNX file asked for.
    products : element type of every convolution and matrix product, by the layer's name.
    quantised : products both of whose operands come from DequantizeLinear.
    half_quantised : products where one operand does and the other does not.
    """

    layers: Mapping[str, int]
    tensors: Mapping[str, int]
    casts: Mapping[str, int]
    unexpected_casts: tuple[str, ...]
    products: Mapping[str, str]
    quantised: tuple[str, ...] = ()
    half_quantised: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values; products are counted by type."""
        return asdict(self) | {
            "unexpected_casts": list(self.unexpected_casts),
            "products": dict(Counter(self.products.values())),
            "quantised": len(self.quantised),
            "half_quantised": list(self.half_quantised),
        }

    def problems(self, precision: str, float32: int = 0) -> list[str]:
        """What is not as a graph of this precision should be, a line each; empty: nothing.

        float32 : products that the part keeps in float32 on purpose.
        """
        wanted = PRODUCT_TYPE[precision]
        found = [f"cast that the ONNX file does not have: {cast}" for cast in self.unexpected_casts]
        others = {name: kind for name, kind in self.products.items() if kind != wanted}
        if list(others.values()) != ["float"] * float32:
            found += [
                f"{name} computes in {kind}, not in {wanted}" for name, kind in others.items()
            ]
        if precision == "fp8":
            found += [f"only one operand of {name} is quantised" for name in self.half_quantised]
            if not self.quantised:
                found.append("no product has quantised operands")
        return found


def inspect_network(
    network: Any,  # INetworkDefinition
    onnx_file: Path,  # what it was parsed from
) -> Inspection:
    """Counts a parsed network's layers, types, casts and products.

    Raises
    ------
    ValueError : the `onnx` package is not installed.
    """
    need("onnx")
    import onnx

    model = onnx.load(str(onnx_file), load_external_data=False)
    kinds = {node.name: node.op_type for node in model.graph.node}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    casts: Counter[str] = Counter()
    unexpected, products = [], {}
    quantised: dict[str, list[bool]] = {}
    for layer in layers:
        kind = _kind(layer)
        if kind == "cast" and (change := _change(layer)):
            casts[change] += 1
            if not {kinds.get(name) for name in onnx_names(layer.metadata)} & {"Cast", "CastLike"}:
                unexpected.append(f"{layer.name} ({change})")
        elif kind in PRODUCTS and layer.name not in products:
            products[layer.name] = _element(layer.get_input(0))
            quantised[layer.name] = list(_quantised(layer, makers))
    return Inspection(
        layers=dict(Counter(map(_kind, layers))),
        tensors=dict(Counter(_element(tensor) for tensor in _outputs(layers))),
        casts=dict(casts),
        unexpected_casts=tuple(unexpected),
        products=products,
        quantised=tuple(name for name, found in quantised.items() if all(found)),
        half_quantised=tuple(n for n, found in quantised.items() if any(found) and not all(found)),
    )


def _kind(layer: Any) -> str:
    return str(layer.type.name).lower()


def _element(tensor: Any) -> str:
    return str(tensor.dtype.name).lower()


def _outputs(layers: list[Any]) -> Iterator[Any]:
    for layer in layers:
        for index in range(layer.num_outputs):
            if (tensor := layer.get_output(index)) is not None:
                yield tensor


def onnx_names(text: str) -> list[str]:
    """The ONNX nodes that a layer's metadata names."""
    return ONNX_LAYER.findall(text)


def _change(cast: Any) -> str:
    """``half->float`` of a cast between two floating-point types; else nothing."""
    before, after = _element(cast.get_input(0)), _element(cast.get_output(0))
    return f"{before}->{after}" if before != after and {before, after} <= set(FLOATS) else ""


def _quantised(product: Any, makers: Mapping[str, Any]) -> Iterator[bool]:
    """Whether each of the first two operands comes from a DequantizeLayer. A weight that the layer
    holds itself is no tensor and comes from none."""
    for index in range(2):
        tensor = product.get_input(index) if index < product.num_inputs else None
        maker = None if tensor is None else makers.get(tensor.name)
        while maker is not None and _kind(maker) in MOVES:
            before = maker.get_input(0)
            maker = None if before is None else makers.get(before.name)
        yield maker is not None and _kind(maker) == "dequantize"
