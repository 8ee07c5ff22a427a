"""TensorRT-RTX builds the decoders of the published sizes for every capability; random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.export.real import real_pipeline
from gen3r_export.config import ExportConfig
from gen3r_export.export import model_of, run_export
from gen3r_export.tensorrt_library import RTX_CAPABILITIES
from tests.export.built import check_plans, told


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
        capabilities=RTX_CAPABILITIES,
        out=tmp_path / "plans",
    )
    pipeline = real_pipeline((part,), torch.float16)
    done = run_export(lambda: model_of(pipeline, "random weights"), config, lambda line: None)
    assert not done.failed, done.failed
    files = [entry for entry in done.entries if entry.format == "onnx"]
    plans = [entry for entry in done.entries if entry.format == "tensorrt"]
    assert [entry.form for entry in files] == ["first", "next"]
    check_plans(files, plans)
    # Weights of hundreds of megabytes lie beside the graph.
    assert all(len(entry.files) == 2 for entry in files if entry.bytes > 3e8)
    record_property("summary", told(f"GEN3R's {part}", files, plans))
