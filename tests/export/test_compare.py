"""Which errors of a result are accepted, and which ONNX files are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen3r_export.compare import relative_error, wrong
from gen3r_export.onnx_check import check_onnx, measure
from gen3r_export.onnx_runner import open_onnx
from tests.export.made import double_graph, write_double


def test_what_is_wrong() -> None:
    assert wrong(1e-5, "fp32", 0.0) is None
    assert wrong(3e-3, "fp16", 2e-3) is None, "twice PyTorch's own error"
    assert wrong(3e-2, "fp8", 1e-3) is None
    assert "the bound is 2.00e-03" in str(wrong(3e-3, "fp16", 1e-4))
    assert "differs from float32 by 1.00e-02" in str(wrong(1e-2, "bf16", 2e-3))
    infinite = relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2))
    for precision in ("fp32", "fp16", "bf16", "fp8"):
        assert "not finite in" in str(wrong(infinite, precision, infinite))


def test_a_wrong_onnx_file_is_refused(tmp_path: Path) -> None:
    path, graph = tmp_path / "camera_head.onnx", double_graph()
    write_double(path)
    assert check_onnx(path, graph, "fp32", run=True).errors["float32"] == 0
    write_double(path, 2.1)
    with pytest.raises(ValueError, match=r"camera_head.onnx is wrong in onnxruntime: it differs"):
        check_onnx(path, graph, "fp32", run=True)


def test_an_axis_is_tried_beyond_one(tmp_path: Path) -> None:
    write_double(tmp_path / "double.onnx")
    runner, sizes = open_onnx(tmp_path / "double.onnx"), []

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        return runner(*inputs)

    measure(run, double_graph())
    assert sizes == [1, 2], "the best length is 1"
