"""ONNX files of the model's parts: exported, checked, run at several lengths, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import gen3r_export.onnx as module
from gen3r_export.compare import BOUNDS, largest_error
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DimRange, Graph, TensorSpec
from gen3r_export.onnx import export_onnx, open_onnx
from tests.conftest import REPOSITORY
from tests.export.conftest import OnnxFile, shallow_graph, shallow_pipeline

# All graphs of NANO are exported for test_nano_onnx, with static axes. These have the dynamic ones:
# every derived axis, caches, masks, tables that follow the clip, chunks of one frame.
DYNAMIC = (
    *("text_encoder", "image_encoder"),
    *("vae_decoder_first", "vae_decoder_next"),
    *("denoiser_prepare", "denoiser_step"),
)
Files = Callable[..., OnnxFile]


def quiet(line: str) -> None:
    """Tells nobody."""


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_graph_equals_pytorch_at_every_length(name: str, onnx_file: Files) -> None:
    file = onnx_file(name)
    assert file.exported.checked == {"onnx.checker": "passed", "run": "onnxruntime on the CPU"}
    assert set(file.exported.errors) == {"same", "float32", "module"}
    assert max(file.exported.errors.values()) <= BOUNDS["fp32"]
    runner = open_onnx(file.path)
    graph = file.graph
    assert runner.names_in == tuple(spec.name for spec in graph.inputs)
    assert (runner.inputs, runner.outputs) == (graph.inputs, graph.outputs)
    assert runner.ranges == {axis: (dim.least, dim.most) for axis, dim in graph.dims.items()}
    # The least lengths, and those of tracing, were compared as it was exported; here one of each.
    others = {"batch": 1, "tokens": 7}
    lengths = {axis: others.get(axis, length) for axis, length in graph.lengths("most").items()}
    given = graph.example(lengths)
    with torch.no_grad():
        assert largest_error(runner(*given), graph.module(*given)) <= BOUNDS["fp32"]


def test_chunks_give_the_clip(onnx_file: Files) -> None:
    """First and next chunks, of one and of two latent frames, are the clip that `decode` gives."""
    first, following = (open_onnx(onnx_file(f"vae_decoder_{form}").path) for form in
                        ("first", "next"))  # fmt: skip
    latents = torch.randn(1, 16, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    piece, *cache = first(latents[:, :, :1].contiguous())
    found = [piece]
    for a, b in ((1, 2), (2, 4)):
        piece, *cache = following(latents[:, :, a:b].contiguous(), *cache)
        found.append(piece)
    with torch.no_grad():
        expected = shallow_pipeline("float32").wan_vae.decode(latents)
    assert largest_error([torch.cat(found, dim=2)], [expected]) <= BOUNDS["fp32"]


@pytest.mark.parametrize("name", ["image_encoder", "adapter_decoder_first"])
def test_half_precision(name: str, onnx_file: Files) -> None:
    file = onnx_file(name, "fp16", dynamic=False)
    assert file.exported.errors["float32"] <= BOUNDS["fp16"]
    types = {value.type.tensor_type.elem_type for value in onnx.load(file.path).graph.output}
    assert types == {onnx.TensorProto.FLOAT16}


def test_bf16_is_checked_and_says_why_it_is_not_run(onnx_file: Files) -> None:
    file = onnx_file("image_encoder", "bf16", dynamic=False)
    assert file.exported.checked["onnx.checker"] == "passed"
    assert "no bf16" in file.exported.checked["run"] and not file.exported.errors
    with pytest.raises(ValueError, match=r"does not run image_encoder.onnx on cpu: .*fp32 or fp16"):
        open_onnx(file.path)


def test_what_is_in_a_file(onnx_file: Files) -> None:
    file = onnx_file("vae_decoder_next")
    model = onnx.load(file.path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert kept["part"] == "vae_decoder" and kept["form"] == "next"
    assert kept["precision"] == "fp32" and kept["weights"] == "unchanged"
    assert model.producer_name == "gen3r-engine" and model.opset_import[0].version == 20
    assert str(REPOSITORY).encode() not in file.path.read_bytes()  # nor any source line
    axes = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim}
    assert axes == {"", "frames"}
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"GatherND", "ScatterND", "If", "Loop"} and "Resize" in operators
    own = shallow_pipeline("float32").wan_vae.model.decoder.state_dict()
    weights = {onnx.numpy_helper.to_array(w).tobytes() for w in model.graph.initializer}
    convolutions = [value for name, value in own.items() if value.dim() == 5 and ".2.w" in name]
    assert convolutions and all(w.numpy().tobytes() in weights for w in convolutions)


def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTERNAL_BYTES", 1000)
    graph = shallow_graph("image_encoder", dynamic=False)
    exported = export_onnx(graph, tmp_path, ExportConfig(), quiet)
    assert exported.files == ("image_encoder.onnx", "image_encoder.onnx.data")
    assert exported.errors["float32"] <= BOUNDS["fp32"]
    file, data = (tmp_path / name for name in exported.files)
    assert file.stat().st_size < data.stat().st_size
    content = data.read_bytes()
    data.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match=r"image_encoder.onnx.data has \d+ bytes and .* needs"):
        open_onnx(file)
    data.unlink()
    with pytest.raises(ValueError, match=r"has its weights in image_encoder.onnx.data, which is"):
        open_onnx(file)


def test_not_run_where_not_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    graph = shallow_graph("image_encoder", dynamic=False)
    exported = export_onnx(graph, tmp_path, ExportConfig(run=False), lines.append)
    assert exported.checked["run"] == "not asked for" and not exported.errors
    assert len(lines) == 1 and lines[0].startswith("image_encoder: ")
    assert capfd.readouterr() == ("", "")


class InPlace(nn.Module):
    """Writes into a tensor at indices that an input holds."""

    def forward(self, x: Tensor, where: Tensor) -> tuple[Tensor]:
        return (x.index_put((where,), x[:2] * 2),)


def test_forbidden_operators_are_named(tmp_path: Path) -> None:
    graph = Graph(
        name="in_place",
        part="in_place",
        form="whole",
        module=InPlace(),
        inputs=(TensorSpec("x", (4, 3), "float32"), TensorSpec("where", (2,), "int64")),
        outputs=(TensorSpec("y", (4, 3), "float32"),),
        dims={},
        example=lambda lengths: (torch.ones(4, 3), torch.tensor([0, 2])),
    )
    with pytest.raises(ValueError, match=r"in_place has .*1 x ScatterND \(concatenate; do not"):
        export_onnx(graph, tmp_path, ExportConfig(), quiet)
    assert not list(tmp_path.iterdir())


def test_an_axis_that_is_no_axis(tmp_path: Path) -> None:
    graph = shallow_graph("image_encoder")
    (pixels,) = graph.inputs
    wrong = replace(
        graph,
        inputs=(replace(pixels, shape=("batch", "colours", *pixels.shape[2:])),),
        dims=graph.dims | {"colours": DimRange(3, 3, 5)},
    )
    with pytest.raises(ValueError, match=r"image_encoder cannot be traced at .*colours"):
        export_onnx(wrong, tmp_path, ExportConfig(), quiet)
