"""Resampling as ONNX has it equals PyTorch's `nearest-exact`, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.geometry_adapter import ENLARGEMENT
from gen3r_export.graph import Graph, TensorSpec
from gen3r_export.onnx import convert
from gen3r_export.onnx_translate import forbidden


def resize(*, scales: list[float] | None = None) -> onnxruntime.InferenceSession:
    """x [1, 1, h, w] enlarged by `scales`, or to `sizes`, as the exporter writes it."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", "w"])]
    constants = []
    if scales is None:
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]))
    else:
        constants.append(helper.make_tensor("scales", TensorProto.FLOAT, [4], scales))
    names = ["x", "", "", "sizes"] if scales is None else ["x", "", "scales"]
    node = helper.make_node(
        "Resize",
        names,
        ["y"],
        mode="nearest",
        coordinate_transformation_mode="half_pixel",
        nearest_mode="round_prefer_ceil",
    )
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, "H", "W"])
    graph = helper.make_graph([node], "g", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def test_enlarging_token_maps() -> None:
    """1.75 times, of every side up to 256 tokens (3,584 pixels)."""
    session = resize(scales=[1.0, 1.0, ENLARGEMENT, ENLARGEMENT])
    for side in range(1, 257):
        x = torch.arange(4.0 * side).view(1, 1, 4, side)
        expected = F.interpolate(x, scale_factor=ENLARGEMENT, mode="nearest-exact")
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.array_equal(found, expected.numpy()), side


def test_resizing_latents_to_token_grids() -> None:
    """8/7 times, of every multiple of 7 up to 448 latents (3,584 pixels)."""
    session = resize()
    for side in range(7, 449, 7):
        x = torch.arange(7.0 * side).view(1, 1, 7, side)
        expected = F.interpolate(x, size=(8, side // 7 * 8), mode="nearest-exact")
        given = {"x": x.numpy(), "sizes": np.array(expected.shape, np.int64)}
        (found,) = session.run(None, given)
        assert np.array_equal(found, expected.numpy()), side


class Both(nn.Module):
    """The adapter's two resamplings."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = F.interpolate(x, scale_factor=ENLARGEMENT, mode="nearest-exact")
        return wide, F.interpolate(wide, size=(8, 16), mode="nearest-exact")


@pytest.mark.parametrize("opset", [18, 23])
def test_the_exporter_writes_it_so(opset: int, tmp_path: Path) -> None:
    x = torch.arange(2.0 * 3 * 4 * 8).view(2, 3, 4, 8)
    graph = Graph(
        name="both",
        part="both",
        form="whole",
        module=Both(),
        inputs=(TensorSpec("x", (2, 3, 4, 8), "float32"),),
        outputs=(
            TensorSpec("wide", (2, 3, 7, 14), "float32"),
            TensorSpec("grid", (2, 3, 8, 16), "float32"),
        ),
        dims={},
        example=lambda lengths: (x,),
    )
    model = convert(graph, opset)
    assert model.opset_imports[""] == opset and not forbidden(model)
    assert [node.op_type for node in model.graph] == ["Resize", "Resize"]
    ir.save(model, tmp_path / "both.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "both.onnx")
    found = session.run(None, {"x": x.numpy()})
    for a, b in zip(found, Both()(x), strict=True):
        assert np.array_equal(a, b.numpy())


def test_forbidden() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [2])
    nodes = [
        ir.node("ScatterND", [x, x, x], name="a"),
        ir.node("ScatterND", [x, x, x], name="b"),
        ir.node("Add", [x, x], name="c"),
        ir.node("attention", [x], domain="gen3r", name="d"),
    ]
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, opset_imports={"": 20})
    found = forbidden(ir.Model(graph, ir_version=10))
    assert found == [
        "2 x ScatterND (concatenate; do not write in place)",
        "1 x gen3r::attention (write it with PyTorch's own operators)",
    ]
