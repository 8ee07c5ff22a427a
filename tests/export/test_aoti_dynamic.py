"""Dynamic axes of packages: every length gives its own shapes, or the export fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gen3r_export.aoti import export_aoti, open_aoti
from gen3r_export.aoti_dynamic import unchanged_axes
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DimRange, Graph, TensorSpec
from gen3r_export.trace import trace


class PerFrame(nn.Module):
    """A convolution of each of 4 n images: 16 and more at once are a question that binds n."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.conv(x),)


def graph() -> Graph:
    torch.manual_seed(0)
    spec = TensorSpec("x", ("4*frames", 2, 6, 6), "float32")

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        return (torch.randn(spec.sizes(lengths), generator=torch.Generator().manual_seed(1)),)

    return Graph(
        name="frames",
        part="vae_decoder",
        form="next",
        module=PerFrame().eval(),
        inputs=(spec,),
        outputs=(TensorSpec("y", ("4*frames", 3, 6, 6), "float32"),),
        dims={"frames": DimRange(1, 4, 4)},
        example=example,
    )


@pytest.mark.slow
def test_a_package_takes_every_length(tmp_path: Path) -> None:
    found = graph()
    exported = export_aoti(found, tmp_path, ExportConfig(format="aoti"), lambda line: None)
    runner = open_aoti(tmp_path / exported.files[0], "cpu")
    for frames in (1, 2, 3, 4):
        given = found.example({"frames": frames})
        with torch.no_grad():
            torch.testing.assert_close(runner(*given), found.module(*given))


def test_an_axis_that_was_bound_is_an_error() -> None:
    program = trace(graph())
    (value,) = (n.meta["val"] for n in program.graph.nodes if n.name == "inputs_0")
    with unchanged_axes(program, "frames"):
        assert value.shape[0] >= 4  # holds for every length: nothing is bound
    with (
        pytest.raises(ValueError, match=r"frames cannot be compiled for every length from 2 to 4"),
        unchanged_axes(program, "frames"),
    ):
        assert value.shape[0] >= 16
