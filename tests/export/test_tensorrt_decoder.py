"""The NANO decoder of the geometry adapter as ONNX, built by TensorRT-RTX for every capability."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen3r.nano import build_nano
from gen3r_export.config import ExportConfig
from gen3r_export.graph import Graph
from gen3r_export.onnx import export_onnx
from gen3r_export.parts import graphs
from gen3r_export.tensorrt import build_tensorrt
from gen3r_export.tensorrt_library import RTX_CAPABILITIES

CONFIG = ExportConfig(
    parts=("adapter_decoder",),
    format="tensorrt",
    precision="fp16",
    form="chunk",
    run=False,
    capabilities=RTX_CAPABILITIES,
)


def quiet(line: str) -> None:
    """Tells nobody."""


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    """The graph of the first chunk, and its ONNX file."""
    folder = tmp_path_factory.mktemp("decoder")
    graph = next(iter(graphs(build_nano().to(torch.float16), CONFIG)))
    exported = export_onnx(graph, folder, CONFIG, quiet)
    return graph, folder / exported.files[0]


def test_a_decoder_builds_for_every_capability(decoder: tuple[Graph, Path], tmp_path: Path) -> None:
    graph, file = decoder
    exported = build_tensorrt(file, graph, tmp_path, CONFIG, quiet)
    assert exported.files == tuple(
        f"adapter_decoder_first.sm{number}.rtx.plan" for number in RTX_CAPABILITIES
    )
    assert exported.checked["layers"] == "passed"
    network = exported.facts["network"]
    # 32 convolutions and the two products of attention in half; norms in float32, as in PyTorch.
    assert network["products"] == {"half": 34} and not network["unexpected_casts"]
    assert set(network["casts"]) == {"half->float", "float->half"}
    for plan in exported.facts["plans"].values():
        inspection = plan["inspection"]
        assert inspection["products"] == {"half": 34}
        # Far fewer kernels than nodes: norms, activations and joins go into their neighbours.
        assert inspection["groups"] < 100 < 300 < inspection["onnx_layers"]
