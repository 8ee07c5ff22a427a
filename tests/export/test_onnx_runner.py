"""ONNX files in onnxruntime: torch tensors in and out, and what may be wrong with either."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from gen3r_export.onnx_runner import DIMS, OnnxRunner, open_onnx

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def write(path: Path, dtype: str = "float32") -> Path:
    """x [batch, 4] and y [2*batch, frames+1, 4] to x summed over axis 1, and y doubled."""
    kind = KINDS[dtype]
    shapes = {"x": ["batch", 4], "y": ["2*batch", "frames+1", 4], "sums": ["batch"]}
    shapes["doubled"] = shapes["y"]
    value = {n: helper.make_tensor_value_info(n, kind, s) for n, s in shapes.items()}
    nodes = [
        helper.make_node("ReduceSum", ["x", "one"], ["sums"], keepdims=0),
        helper.make_node("Add", ["y", "y"], ["doubled"]),
    ]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        nodes, "g", [value["x"], value["y"]], [value["sums"], value["doubled"]], [one]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {DIMS: '{"batch": [1, 3], "frames": [2, 5]}'})
    onnx.save(model, path)
    return path


@pytest.fixture
def runner(tmp_path: Path) -> OnnxRunner:
    return open_onnx(write(tmp_path / "two.onnx"))


def inputs(batch: int = 2, frames: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 4), torch.rand(2 * batch, frames + 1, 4)


@pytest.mark.parametrize("dtype", KINDS)
def test_runs(tmp_path: Path, dtype: str) -> None:
    runner = open_onnx(write(tmp_path / "two.onnx", dtype))
    assert runner.names_in == ("x", "y") and runner.names_out == ("sums", "doubled")
    for batch, frames in ((1, 2), (3, 5)):
        x, y = ((10 * t).to(getattr(torch, dtype)) for t in inputs(batch, frames))
        sums, doubled = runner(x, y)
        assert torch.allclose(sums.double(), x.double().sum(1), rtol=1e-3)
        assert torch.equal(doubled, y + y) and doubled.dtype == y.dtype


def test_inputs_that_are_views_and_results_that_stay(runner: OnnxRunner) -> None:
    x, y = inputs()
    wide = torch.stack([x, -x], dim=-1)
    sums, doubled = runner(wide[..., 0], y.transpose(0, 1).contiguous().transpose(0, 1))
    kept = doubled.clone()
    runner(x, 0 * y)
    assert torch.allclose(sums, x.sum(1)) and torch.equal(doubled, kept)
    assert torch.equal(kept, 2 * y)


def test_inputs_that_need_gradients(runner: OnnxRunner) -> None:
    x, y = inputs()
    sums, _ = runner(x.requires_grad_(), y)
    assert not sums.requires_grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (inputs()[:1], r"two.onnx takes 2 inputs \(x, y\), got 1"),
        (
            (inputs()[0].double(), inputs()[1]),
            r"input 'x' of two.onnx is float64; it must",
        ),
        (
            (torch.rand(2, 5), inputs()[1]),
            r"'x' of .* has shape \(2, 5\); expected \[batch, 4",
        ),
        ((torch.rand(8), inputs()[1]), r"'x' of two.onnx has shape \(8,\); expected"),
        ((inputs(1)[0], inputs(2)[1]), r"'y' .* shape \(4, 4, 4\); expected \[2\*batch, frames\+1"),
        ((inputs()[0], torch.rand(3, 4, 4)), r"'y' .* has shape \(3, 4, 4\); expected"),
        (inputs(4), r"two.onnx takes batch from 1 to 3, got 4"),
        (inputs(1, 1), r"two.onnx takes frames from 2 to 5, got 1"),
        (
            tuple(t.to("meta") for t in inputs()),
            r"open on cpu and input 'x' is on meta; move it",
        ),
    ],
)
def test_inputs_that_do_not_fit(
    runner: OnnxRunner, given: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as found:
        runner(*given)
    assert "\n" not in str(found.value)


def test_files_that_do_not_open(tmp_path: Path) -> None:
    path = write(tmp_path / "two.onnx")
    with pytest.raises(ValueError, match=r"none.onnx does not exist; export it again"):
        open_onnx(tmp_path / "none.onnx")
    content = path.read_bytes()
    for length in (0, 1, 40, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"two.onnx is (cut short|not an ONNX)") as found:
            open_onnx(path)
        assert "\n" not in str(found.value)
    path.write_bytes(b"a text, not a graph")
    with pytest.raises(ValueError, match=r"two.onnx is cut short or is no ONNX file"):
        open_onnx(path)


def test_files_that_were_changed(tmp_path: Path) -> None:
    """A name that no tensor has, and one that is no text."""
    path = write(tmp_path / "two.onnx")
    content = path.read_bytes()
    for letter in (b"k", b"\xff"):
        path.write_bytes(content.replace(b"one", b"on" + letter, 1))
        with pytest.raises(ValueError, match="export it again"):
            open_onnx(path)


def test_an_operator_that_onnxruntime_has_not(tmp_path: Path) -> None:
    path = write(tmp_path / "two.onnx")
    model = onnx.load(path)
    model.graph.node[0].domain = "somebody"
    model.opset_import.append(helper.make_opsetid("somebody", 1))
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"two.onnx is not an ONNX file that onnxruntime opens"):
        open_onnx(path)


def test_a_device_that_onnxruntime_has_not(tmp_path: Path) -> None:
    path = write(tmp_path / "two.onnx")
    with pytest.raises(ValueError, match=r"does not run on 'xpu'; install onnxruntime-gpu"):
        open_onnx(path, "xpu")


def test_onnxruntime_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "two.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxruntime is not installed; pip install 'gen3r"):
        open_onnx(path)
