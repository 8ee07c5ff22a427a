"""Q/DQ nodes: which products get them, their scales and rounding, and that TensorRT builds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from gen3r_export.config import ExportConfig
from gen3r_export.graph import Graph, TensorSpec
from gen3r_export.onnx import export_onnx
from gen3r_export.onnx_fp8 import LARGEST, LEAST_SCALE, _scale
from gen3r_export.tensorrt import build_tensorrt
from tests.export.conftest import OnnxFile

FP8 = ExportConfig(precision="fp8")
# A rounding to four significant bits is off by 2^-4 at most, by 0.026 in the mean square; two
# factors of a product and three products deep in the graphs here: 0.06, half of it again allowed.
BOUND = 0.1


def quiet(line: str) -> None:
    """Tells nobody."""


class Small(nn.Module):
    """Four products: the first and the last stay, a 3D convolution and a linear layer do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(16, 32, 1)
        self.conv = nn.Conv3d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, 48)
        self.narrow = nn.Linear(48, 24)
        self.last = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = torch.relu(self.conv(torch.relu(self.first(x))))
        x = torch.relu(self.linear(x.permute(0, 2, 3, 4, 1)))
        return (self.last(torch.relu(self.narrow(x))),)


def small_graph(gain: float = 1.0) -> Graph:
    torch.manual_seed(0)
    module = Small().half().eval()
    x = gain * torch.randn(1, 16, 4, 8, 8).half()
    return Graph(
        name="small",
        part="small",
        form="whole",
        module=module,
        inputs=(TensorSpec("x", (1, 16, 4, 8, 8), "float16"),),
        outputs=(TensorSpec("y", (1, 4, 8, 8, 16), "float16"),),
        dims={},
        example=lambda lengths: (x,),
        wide=lambda: _wide(module),
    )


def _wide(module: nn.Module) -> nn.Module:
    wide = Small().eval()
    wide.load_state_dict({name: value.float() for name, value in module.state_dict().items()})
    return wide


def test_scales() -> None:
    peaks = np.array([0.0, 1e-3, 1.0, 3.7, 448.0, 1e4])
    scales = _scale(peaks)
    assert scales.dtype == np.float16 and scales[0] == LEAST_SCALE
    assert (scales.astype(np.float64) * LARGEST >= peaks).all()  # nothing is cut off
    large = peaks / LARGEST > LEAST_SCALE
    assert (scales[large] <= peaks[large] / LARGEST * (1 + 2**-10)).all()


def test_the_opset_has_8_bits() -> None:
    with pytest.raises(ValueError, match="opset 18 has no floats of 8 bits; use 19 to 23"):
        ExportConfig(precision="fp8", opset=18)


def test_a_quantised_graph(tmp_path: Path) -> None:
    graph = small_graph()
    exported = export_onnx(graph, tmp_path, FP8, quiet)
    assert exported.facts["products_fp8"] == 2 and exported.facts["products_fp16"] == 3
    assert exported.checked == {"onnx.checker": "passed", "run": "onnxruntime on the CPU"}
    assert 1e-3 < exported.errors["float32"] < BOUND
    model = onnx.load(tmp_path / "small.onnx")
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert kept["precision"] == "fp8" and "float8_e4m3fn" in kept["weights"]
    counts = [sum(n.op_type == kind for n in model.graph.node) for kind in
              ("QuantizeLinear", "DequantizeLinear")]  # fmt: skip
    assert counts == [2, 4]
    weights = {w.name: w for w in model.graph.initializer}
    assert set(weights) <= {name for node in model.graph.node for name in node.input}
    for name, exact, axis in (
        ("conv", graph.module.get_parameter("conv.weight"), 0),
        ("linear", graph.module.get_parameter("linear.weight").T, 1),
    ):
        (node,) = [
            n for n in model.graph.node
            if n.op_type == "DequantizeLinear" and n.input[0] in weights
            and tuple(weights[n.input[0]].dims) == tuple(exact.shape)
        ]  # fmt: skip
        narrow = numpy_helper.to_array(weights[node.input[0]])
        scale = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
        assert narrow.dtype == ml_dtypes.float8_e4m3fn and node.attribute[0].i == axis, name
        assert scale.shape == (exact.shape[axis],)
        shape = [-1 if i == axis else 1 for i in range(exact.dim())]
        found = narrow.astype(np.float32) * scale.reshape(shape)
        wanted = exact.detach().float().numpy()
        # Half a step: 2^-4 of a value, or of the smallest that is not subnormal.
        step = np.maximum(np.abs(wanted), scale.reshape(shape) * 2.0**-6) * 2.0**-4
        assert (np.abs(found - wanted) <= step).all(), name


def test_activations_that_overflow(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small: '.*' overflows fp16 on the example, .*in bf16"):
        export_onnx(small_graph(6e4), tmp_path, FP8, quiet)
    assert not list(tmp_path.iterdir())


def test_an_encoder_builds_in_tensorrt(onnx_file: Callable[..., OnnxFile], tmp_path: Path) -> None:
    file = onnx_file("image_encoder", "fp8", dynamic=False)
    assert file.exported.errors["float32"] < BOUND
    assert file.exported.facts["products_fp8"] == 5
    config = ExportConfig(format="tensorrt", precision="fp8", run=False, capabilities=("89", "120"))
    built = build_tensorrt(file.path, file.graph, tmp_path, config, quiet)
    assert len(built.files) == 2 and built.checked["layers"] == "passed"
