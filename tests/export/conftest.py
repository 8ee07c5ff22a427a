"""ONNX files of small graphs, each exported once a session when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from gen3r.nano import ARCHITECTURE, build_tokenizer, random_modules
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import make_euler_scheduler
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DTYPES, Exported, Graph
from gen3r_export.onnx import export_onnx
from gen3r_export.parts import PART_NAMES, graphs
from gen3r_kernels import Backends

# NANO with the fewest layers that still have every kind of node: tracing takes time by the node.
SHALLOW = replace(
    ARCHITECTURE,
    transformer=replace(ARCHITECTURE.transformer, num_layers=1),
    wan_vae=replace(ARCHITECTURE.wan_vae, num_res_blocks=0),
    geo_adapter=replace(ARCHITECTURE.geo_adapter, num_res_blocks=0),
)


@dataclass(frozen=True)
class OnnxFile:
    """A graph, its ONNX file, and what exporting gave."""

    graph: Graph
    path: Path
    exported: Exported


@cache
def shallow_pipeline(dtype: str) -> Gen3RPipeline:
    """Seeded random weights."""
    return Gen3RPipeline(
        config=SHALLOW,
        **random_modules(SHALLOW, Backends(), DTYPES[dtype], "cpu"),
        tokenizer=build_tokenizer(),
        scheduler=make_euler_scheduler(),
        untrained=True,
    )


def shallow_graph(name: str, precision: str = "fp32", *, dynamic: bool = True) -> Graph:
    """A graph by name, of 56 x 56 pixels; 1 to 2 scenes and 5 to 9 frames, or 1 and 5.

    The autoencoders have one scene: their many nodes take twice as long to trace with two axes.
    """
    part = next(part for part in PART_NAMES if name.startswith(part))
    chunk = name.startswith(("vae", "adapter"))
    config = ExportConfig(
        parts=(part,),
        precision=precision,
        height=56,
        width=56,
        frames=(5, 9) if dynamic else (5, 5),
        batch=(1, 2) if dynamic and not chunk else (1, 1),
        form="chunk" if chunk else "clip",
    )
    made = graphs(shallow_pipeline(config.dtype), config)
    return next(graph for graph in made if graph.name == name)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxFile]:
    """``onnx_file(name, precision, dynamic=...)``: see `shallow_graph`."""

    @cache
    def export(name: str, precision: str = "fp32", *, dynamic: bool = True) -> OnnxFile:
        graph = shallow_graph(name, precision, dynamic=dynamic)
        folder = tmp_path_factory.mktemp(f"{name}-{precision}")
        config = ExportConfig(precision=precision)
        with torch.random.fork_rng():
            exported = export_onnx(graph, folder, config, lambda line: None)
        return OnnxFile(graph, folder / exported.files[0], exported)

    return export
