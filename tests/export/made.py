"""A small graph, its ONNX file made by hand, and exporters that take no time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from gen3r_export.config import ExportConfig
from gen3r_export.files import file_facts
from gen3r_export.graph import DimRange, Exported, Graph, Tell, TensorSpec
from gen3r_export.manifest import Entry, Manifest
from gen3r_export.parts import COMPONENT

SIZE = 4


class Double(nn.Module):
    """Twice the input; the weight makes it a module of a dtype."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.factor,)


def double_graph(name: str = "camera_head", part: str = "camera_head") -> Graph:
    """x [batch, 4] to 2 x, batch 1 to 3."""

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        return (torch.arange(lengths["batch"] * SIZE).reshape(-1, SIZE).float(),)

    return Graph(
        name=name,
        part=part,
        form="whole",
        module=Double().eval(),
        inputs=(TensorSpec("x", ("batch", SIZE), "float32"),),
        outputs=(TensorSpec("y", ("batch", SIZE), "float32"),),
        dims={"batch": DimRange(1, 1, 3)},
        example=example,
    )


def write_double(path: Path, factor: float = 2.0, *, external: bool = False) -> tuple[str, ...]:
    """The graph as an ONNX file; names of the files."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", SIZE])],
        [onnx.numpy_helper.from_array(torch.full((SIZE,), factor).numpy(), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if not external:
        onnx.save(model, path)
        return (path.name,)
    beside = f"{path.name}.data"
    onnx.save(
        model, path, save_as_external_data=True, location=beside, size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    return path.name, beside


def export_double(graph: Graph, folder: Path, config: ExportConfig, tell: Tell) -> Exported:
    """Stands for `export_onnx`."""
    files = write_double(folder / f"{graph.name}.onnx")
    (folder / "left-over.bin").write_bytes(b"not named by the exporter")
    return Exported(files, {"export": 0.1}, {"float32": 1e-7}, {"run": "passed"}, {"opset": 20})


def made_entry(folder: Path, factor: float = 2.0, **changes: object) -> Entry:
    """An entry with its file in `folder`."""
    graph = double_graph()
    place = str(changes.pop("place", f"camera_head.onnx-fp32.{0:012x}"))
    external = bool(changes.pop("external", False))
    (folder / place).mkdir(parents=True, exist_ok=True)
    names = write_double(folder / place / "camera_head.onnx", factor, external=external)
    values: dict[str, object] = dict(
        name="camera_head",
        part="camera_head",
        form="whole",
        component=COMPONENT["camera_head"],
        format="onnx",
        precision="fp32",
        folder=place,
        files=file_facts(folder / place, names),
        inputs=graph.inputs,
        outputs=graph.outputs,
        dims=dict(graph.dims),
        height=56,
        width=56,
        frames=(5, 5),
        batch=(1, 3),
        device="any",
        gpu=None,
        versions={"torch": "2.13.0"},
        weights="w" * 32,
    )
    return Entry(**(values | changes))  # type: ignore[arg-type]


def made_folder(folder: Path, *entries: Entry) -> Path:
    """plans.json of these entries."""
    (folder / "plans.json").write_text(Manifest("made", entries).to_json())
    return folder
