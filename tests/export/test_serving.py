"""The model repository for Triton Inference Server, parsed with its published protobuf schema."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen3r_export.graph import DimRange, TensorSpec
from gen3r_export.manifest import Entry, Gpu
from gen3r_export.serving import batch_size, model_config, write_triton_repository
from tests.export.made import made_entry, made_folder

schema = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]"
)
from google.protobuf import text_format  # noqa: E402


def parsed(text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


def values(tensors: Any) -> list[tuple[str, str, list[int]]]:
    return [(t.name, schema.DataType.Name(t.data_type), list(t.dims)) for t in tensors]


def test_an_onnx_model(tmp_path: Path) -> None:
    entry = made_entry(tmp_path, external=True)
    done = write_triton_repository(made_folder(tmp_path, entry), tmp_path / "models")
    model = tmp_path / "models" / "camera_head"
    assert done.models == {"camera_head": entry} and not done.refused
    config = parsed((model / "config.pbtxt").read_text())
    assert (config.name, config.backend) == ("camera_head", "onnxruntime")
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 3)
    assert values(config.input) == [("x", "TYPE_FP32", [4])], "the batch is Triton's"
    assert values(config.output) == [("y", "TYPE_FP32", [4])]
    assert config.parameters["precision"].string_value == "fp32"
    assert sorted(p.name for p in (model / "1").iterdir()) == [
        "camera_head.onnx.data",
        "model.onnx",
    ]
    source = tmp_path / entry.folder / "camera_head.onnx"
    assert (model / "1" / "model.onnx").samefile(source), "a hard link"

    import onnxruntime

    onnxruntime.InferenceSession(
        str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )


def chunk(entry: Entry, **changes: Any) -> Entry:
    """Shapes as a decoder's following chunk has them."""
    inputs = (
        TensorSpec("latents", ("batch", 16, "frames", 7, 7), "float16"),
        TensorSpec("cache_0", ("batch", 8, 2, 7, 7), "float16"),
    )
    outputs = (TensorSpec("video", ("batch", 3, "4*frames", 56, 56), "float16"),)
    dims = {"batch": DimRange(1, 1, 4), "frames": DimRange(1, 2, 3)}
    return replace(entry, **({"inputs": inputs, "outputs": outputs, "dims": dims} | changes))


def test_dynamic_axes(tmp_path: Path) -> None:
    config = parsed(model_config("m", chunk(made_entry(tmp_path))))
    assert config.max_batch_size == 4
    assert values(config.input)[0] == ("latents", "TYPE_FP16", [16, -1, 7, 7])
    assert values(config.output) == [("video", "TYPE_FP16", [3, -1, 56, 56])]


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": {"batch": DimRange(2, 2, 4), "frames": DimRange(1, 2, 3)}},  # Triton sends ones
        {"inputs": (TensorSpec("text", ("2*batch", 4), "int64"),)},
        {"inputs": (TensorSpec("k_text", (8, "2*batch", 4), "bfloat16"),)},
        {"inputs": (TensorSpec("timesteps", ("steps",), "float32"),)},
        {"outputs": (TensorSpec("tables", ("steps", 4), "float32"),)},
        {"dims": {}, "inputs": (TensorSpec("x", (2, 4), "float32"),)},
    ],
)
def test_batches_that_are_not_tritons(tmp_path: Path, changes: dict[str, Any]) -> None:
    entry = chunk(made_entry(tmp_path), **changes)
    assert batch_size(entry) == 0
    config = parsed(model_config("m", entry))
    assert config.max_batch_size == 0
    for spec, tensor in zip((*entry.inputs, *entry.outputs), (*config.input, *config.output),
                            strict=True):  # fmt: skip
        assert len(tensor.dims) == len(spec.shape), "whole shapes"
        wanted = [n if isinstance(n, int) else -1 for n in spec.shape]
        assert list(tensor.dims) == wanted


def test_types_backends_and_names(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    types = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64"}
    for dtype, name in (types | {"int32": "INT32"}).items():
        typed = replace(entry, inputs=(TensorSpec("x", ("batch", 4), dtype),))
        assert values(parsed(model_config("m", typed)).input)[0][1] == f"TYPE_{name}"
    package = replace(chunk(entry), format="aoti", device="cuda")
    config = parsed(model_config("m", package))
    assert (config.backend, config.platform) == ("pytorch", "torch_aoti")
    assert [t.name for t in config.input] == ["INPUT__0", "INPUT__1"]
    assert [t.name for t in config.output] == ["OUTPUT__0"]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    plan = replace(entry, format="tensorrt", gpu=Gpu("90"), device="cuda")
    config = parsed(model_config("m", plan))
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")


def test_several_of_a_graph_and_what_is_refused(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    half = made_entry(tmp_path, precision="fp16")
    wide = made_entry(tmp_path, precision="fp16", width=112)
    rtx = made_entry(tmp_path, format="tensorrt", versions={"tensorrt-rtx": "1.7"}, gpu=Gpu("89"))
    folder = made_folder(tmp_path, entry, half, wide, rtx)
    done = write_triton_repository(folder, tmp_path / "m")
    assert len(done.models) == 3 and "camera_head_onnx_fp32_5-5x56x56_b1-3" in done.models
    assert list(done.refused) == ["camera_head (tensorrt fp32 for sm_89)"]
    assert "no backend for TensorRT-RTX" in next(iter(done.refused.values()))
    made_folder(tmp_path, rtx)
    with pytest.raises(ValueError, match=r"has nothing that Triton can serve .*TensorRT-RTX"):
        write_triton_repository(folder, tmp_path / "n")
    with pytest.raises(ValueError, match=r"nose is not in .*; there are: camera_head"):
        write_triton_repository(folder, tmp_path / "n", ["nose"])


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    entry = made_entry(tmp_path)
    folder = made_folder(tmp_path, entry)
    (tmp_path / entry.folder / entry.main_file).write_bytes(b"cut")
    with pytest.raises(ValueError, match="it was cut short"):
        write_triton_repository(folder, tmp_path / "deep" / "models")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "models").mkdir()
    with pytest.raises(FileExistsError, match="exists; choose another folder or remove it"):
        write_triton_repository(made_folder(tmp_path, made_entry(tmp_path)), tmp_path / "models")
