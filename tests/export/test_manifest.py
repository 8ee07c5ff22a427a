"""plans.json: round trip, merging, all that may be wrong with the file; hashes of weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r.nano import EMBEDDED, build_nano
from gen3r_export.manifest import FILE, Gpu, Manifest, parse_manifest, read_manifest
from gen3r_export.weights import checkpoint_hashes, module_hash, pipeline_hashes
from tests.export.made import made_entry


def test_round_trip(tmp_path: Path) -> None:
    entry = made_entry(tmp_path, gpu=Gpu("90", "NVIDIA H100"), errors={"float32": float("inf")})
    again = parse_manifest(Manifest("model", (entry, made_entry(tmp_path))).to_json())
    assert again.model == "model" and len(again.entries) == 2
    first = again.entries[0]
    assert replace(first, errors={}) == replace(entry, errors={})
    assert first.errors == {"float32": None}, "JSON has no infinity"
    assert str(first) == "camera_head (onnx fp32 for sm_90 (NVIDIA H100))"
    assert first.main_file == "camera_head.onnx" and first.bytes > 0
    assert first.shape_text() == "5 frames of 56 x 56, 1 to 3 at once"


def test_an_entry_replaces_the_one_of_its_graph_format_precision_shape_and_gpu(
    tmp_path: Path,
) -> None:
    entry = made_entry(tmp_path)
    manifest = Manifest("a", (entry,))
    newer = replace(entry, folder="newer", weights="other")
    merged = manifest.merged([newer], "b")
    assert merged.entries == (newer,) and merged.model == "b"
    for change in (
        {"name": "depth_head"},
        {"precision": "fp16"},
        {"format": "aoti"},
        {"height": 112},
        {"frames": (5, 9)},
        {"batch": (2, 2)},
        {"gpu": Gpu("89")},
    ):
        assert len(manifest.merged([replace(entry, **change)]).entries) == 2, change


def broken(tmp_path: Path, change: dict[str, Any], remove: str = "") -> str:
    raw = json.loads(Manifest("m", (made_entry(tmp_path),)).to_json())
    raw["entries"][0].update(change)
    raw["entries"][0].pop(remove, None)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": "56"}, "height is '56', not of type int"),
        ({"height": True}, "height is 'True', not of type int"),
        ({"files": []}, "files is '[]', not of type dict"),
        ({"files": {}}, "entry camera_head has no files"),
        ({"files": {"a": {"bytes": 1}}}, "'sha256' is missing"),
        ({"files": {"a": 3}}, "stands where an object must be"),
        ({"folder": "../else"}, "'../else' is no plain name"),
        ({"folder": ".."}, "'..' is no plain name"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "no plain name"),
        ({"dims": {"batch": {"least": 3, "best": 1, "most": 2}}}, "must be above 0 and rise"),
        ({"inputs": [{"name": "x", "shape": [1.5], "dtype": "float32"}]}, "more than numbers"),
        ({"inputs": [{"name": "x", "shape": [1], "dtype": "float8"}]}, "dtype 'float8' is unknown"),
        ({"dims": {}}, "axis 'batch' is none of its dims: none"),
        ({"inputs": [{"name": "x", "shape": ["0*batch"], "dtype": "float32"}]}, "axis '0*batch'"),
        ({"frames": [5]}, "frames is [5], not two whole numbers"),
        ({"device": "tpu"}, "device is 'tpu'; known: any, cpu, cuda"),
        ({"more": 1}, "more is unknown"),
    ],
)
def test_wrong_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_manifest(broken(tmp_path, change), "d/plans.json")
    text = str(error.value)
    assert text.startswith("d/plans.json is broken: ") and "export again" in text
    assert "\n" not in text


@pytest.mark.parametrize("key", ["name", "files", "weights", "gpu", "dims", "batch"])
def test_missing_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        parse_manifest(broken(tmp_path, {}, remove=key))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None, this version reads 1"),
        ('{"schema": 2}', "has schema 2, this version reads 1; export again, or use the version"),
        ('{"schema": 1}', "'model' is missing"),
        ('{"schema": 1, "model": "m", "entries": {}}', "entries is '{}', not of type list"),
        ('{"schema": 1, "model": "m", "entries": [3]}', "stands where an object must be"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_manifest(tmp_path)
    assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no plans.json; give a folder that"):
        read_manifest(tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(tmp_path)


def test_weight_hashes_depend_on_the_values_and_not_on_the_dtype() -> None:
    known = checkpoint_hashes(EMBEDDED)  # stored in float16
    pipeline = build_nano(torch.float32)
    assert pipeline_hashes(pipeline) == known == pipeline_hashes(build_nano(torch.float16))
    name, config = "wan_vae", pipeline.config.wan_vae
    vae = pipeline.wan_vae
    with torch.no_grad():
        vae.model.conv2.bias[0] += 1e-3
    changed = module_hash(name, vae, config)
    assert changed != known[name]
    with torch.no_grad():
        vae.model.conv2.bias[0] -= 1e-3
    other = replace(config, latents_mean=(1.0, *config.latents_mean[1:]))
    assert module_hash(name, vae, other) not in (changed, known[name])
    with pytest.raises(ValueError, match="component 'unet' is unknown; known: transformer"):
        module_hash("unet", vae, config)
