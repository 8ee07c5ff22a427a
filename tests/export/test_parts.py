"""The graphs of all parts: names, shapes and values of what is handed to the exporters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r_export.compare import largest_error
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DTYPES, DimRange, Graph, TensorSpec
from gen3r_export.parts import COMPONENT, PART_NAMES, _parts, graphs

STATIC = ExportConfig(height=112, width=56, frames=(9, 9), working_gib=0.01)
DYNAMIC = ExportConfig(height=112, width=56, frames=(5, 9), batch=(1, 2), working_gib=0.01)


@pytest.fixture(scope="module")
def nano() -> Gen3RPipeline:
    return build_nano()


def every(pipeline: Gen3RPipeline, config: ExportConfig) -> Iterator[tuple[Graph, str]]:
    for graph in graphs(pipeline, config):
        for which in ("least", "most") if graph.dims else ("best",):
            yield graph, which


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_every_graph_takes_and_gives_what_it_says(
    nano: Gen3RPipeline, config: ExportConfig
) -> None:
    seen = set()
    for graph, which in every(nano, config):
        seen.add(graph.part)
        lengths, given = graph.lengths(which), graph.examples(which)
        with torch.no_grad():
            found = graph.module(*given)
        for specs, tensors in ((graph.inputs, given), (graph.outputs, found)):
            assert [tuple(t.shape) for t in tensors] == [s.sizes(lengths) for s in specs]
            assert [t.dtype for t in tensors] == [DTYPES[s.dtype] for s in specs]
            assert all(t.isfinite().all() for t in tensors)
    assert seen == set(PART_NAMES) == set(_parts()) == set(COMPONENT)


def test_examples_are_the_same_every_time(nano: Gen3RPipeline) -> None:
    for graph, _ in every(nano, ExportConfig(**{**vars(STATIC), "parts": ("depth_head",)})):
        pairs = zip(graph.examples(), graph.examples(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_chunks_walk_a_clip(nano: Gen3RPipeline) -> None:
    """First and next chunks, with the cache handed on, give the clip that `decode` gives."""
    config = ExportConfig(**{**vars(STATIC), "parts": ("vae_decoder",)})
    clip, first, following = graphs(nano, config)
    (latents,) = clip.examples()
    with torch.no_grad():
        pieces, *cache = first.module(latents[:, :, :1])
        found = [pieces]
        for index in range(1, latents.shape[2]):
            piece, *cache = following.module(latents[:, :, index : index + 1], *cache)
            found.append(piece)
        expected = nano.wan_vae.decode(latents)
        (whole,) = clip.module(latents)
    assert largest_error([torch.cat(found, dim=2), whole], [expected, expected]) < 1e-5


def test_the_denoiser_is_the_transformer(nano: Gen3RPipeline) -> None:
    """`prepare` and `step` give the velocity of the model's own forward pass."""
    config = ExportConfig(**{**vars(STATIC), "parts": ("denoiser",)})
    prepare, step = graphs(nano, config)
    text, image, control, cameras, times = prepare.examples()
    control[1:], cameras[1:], image[1:] = control[:1], cameras[:1], image[:1]
    model = nano.transformer
    with torch.no_grad():
        embedding, tables, *kept = prepare.module(text, image, control, cameras, times)
        latents = step.examples()[0]
        (found,) = step.module(latents, tables[3:4], embedding, *kept)
        conditions = model.condition(list(text), image, control, cameras)
        rows = latents.expand(2, -1, -1, -1, -1)
        expected = model(rows, times[3:4].expand(2), conditions, side_by_side=True)
    assert largest_error([found], [expected]) < 1e-4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"parts": ("vae",)}, "parts vae are unknown; known: text_encoder"),
        ({"frames": (1, 9)}, "use 5 as the least"),
        ({"precision": "fp16"}, "takes it as float16"),
    ],
)
def test_what_cannot_be_exported(
    nano: Gen3RPipeline, values: dict[str, object], expected: str
) -> None:
    config = ExportConfig(**{**vars(STATIC), "parts": ("vae_decoder",), **values})
    with pytest.raises(ValueError, match=expected):
        list(graphs(nano, config))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"format": "torchscript"}, "known: onnx, tensorrt, aoti"),
        ({"precision": "int8"}, "known: fp32, fp16, bf16, fp8"),
        ({"precision": "fp8", "format": "aoti"}, "use bf16"),
        ({"height": 550}, "use 560"),
        ({"frames": (48, 48)}, "use 45 or 49"),
        ({"batch": (4, 1)}, "must not fall"),
        ({"capabilities": ("8.9",)}, "such as 89"),
        ({"workspace_gib": 0.0}, "above 0"),
        ({"opset": 12}, "use 18 to 23"),
        ({"opset": 20, "precision": "bf16"}, "use 22 or 23"),
        ({"device": "tpu"}, "known: cpu, cuda"),
        ({"form": "half"}, "known: auto, clip, chunk, both"),
    ],
)
def test_configs_are_checked(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ExportConfig(**values)  # type: ignore[arg-type]


def test_shapes_are_put_in() -> None:
    spec = TensorSpec("x", ("2*batch", 3, "4*k+1", "k+1"), "float32")
    assert spec.sizes({"batch": 3, "k": 2}) == (6, 3, 9, 3)
    with pytest.raises(ValueError, match="rise"):
        DimRange(4, 2, 8)


def test_errors_are_relative() -> None:
    one = torch.ones(4)
    assert largest_error([one * 1.5], [one]) == pytest.approx(0.5)
    assert largest_error([one * float("nan")], [one]) == float("inf")
    with pytest.raises(ValueError, match="cannot be compared"):
        largest_error([one[:2]], [one])
