"""TensorRT-RTX builds the decoders of the published sizes for every capability; random weights.

Of a decoder taken in chunks the graph of the following chunks, which has every layer. A plan of
hundreds of megabytes is inspected and removed before the next one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.export.real import real_pipeline
from gen3r_export.config import ExportConfig
from gen3r_export.onnx import export_onnx
from gen3r_export.parts import graphs
from gen3r_export.tensorrt import build_tensorrt
from gen3r_export.tensorrt_library import RTX_CAPABILITIES


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae_decoder", "adapter_decoder"])
def test_decoders_of_the_published_size_are_built(
    part: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = ExportConfig(
        parts=(part,),
        format="tensorrt",
        precision="fp16",
        form="chunk",
        height=560,
        width=560,
        frames=(49, 49),
        run=False,
    )
    *_, graph = graphs(real_pipeline((part,), torch.float16), config)
    assert graph.form == "next"
    exported = export_onnx(graph, tmp_path, config, lambda line: None)
    sizes = []
    for capability in RTX_CAPABILITIES:
        one = replace(config, capabilities=(capability,))
        built = build_tensorrt(
            tmp_path / exported.files[0], graph, tmp_path, one, lambda line: None
        )
        assert built.checked["layers"] == "passed"
        (plan,) = (tmp_path / name for name in built.files)
        sizes.append(plan.stat().st_size)
        plan.unlink()
    weights = 2 * sum(p.numel() for p in graph.module.model.model.decoder.parameters())  # type: ignore[union-attr]
    assert min(sizes) > 0.9 * weights
    record_property(
        "summary",
        f"TensorRT-RTX, GEN3R's {graph.name}: {len(sizes)} plans built for SM "
        f"{', '.join(RTX_CAPABILITIES)}, {max(sizes) / 1e6:.0f} MB each; none skipped",
    )
