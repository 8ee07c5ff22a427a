"""Published folder <-> pipeline: round trips, every kind of damage named, streaming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from gen3r.checkpoint import CheckpointError, inspect_checkpoint, resolve_checkpoint
from gen3r.components import COMPONENTS
from gen3r.config import GEN3R
from gen3r.nano import ARCHITECTURE, build_nano, build_untrained
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import SceneRequest
from tests.manifest import manifest_shapes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    build_untrained().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights(folder: Path, component: str) -> Path:
    (path,) = (folder / component).glob("*.safetensors")
    return path


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, path)


def problems(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Gen3RPipeline.from_pretrained(folder)
    return str(error.value)


def test_save_load_run_round_trip(saved: Path) -> None:
    original = build_untrained()
    loaded = Gen3RPipeline.from_pretrained(saved, torch_dtype=torch.float32)
    assert loaded.config == original.config == ARCHITECTURE and loaded.untrained
    assert loaded.tokenizer("a red room").input_ids == original.tokenizer("a red room").input_ids
    for name in COMPONENTS:
        expected = getattr(original, name).state_dict()
        actual = getattr(loaded, name).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[k], expected[k]) for k in expected)
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    request = SceneRequest([image], "a room", num_frames=5, height=56, width=56)
    first, second = (p(requests=[request], num_inference_steps=1)[0] for p in (original, loaded))
    assert torch.equal(first.rgb, second.rgb) and torch.equal(first.points, second.points)


def test_saved_layout_is_the_published_one(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        [*COMPONENTS, "model_index.json", "scheduler", "tokenizer"]
    )
    index = json.loads((saved / "model_index.json").read_text())
    assert index["vggt"] == [None, None]
    assert index["transformer"][1] == "WanTransformer3DModel"
    assert "_class_name" not in json.loads((saved / "vggt" / "config.json").read_text())
    names = load_file(weights(saved, "clip_image_encoder"))
    assert "model.visual.transformer.0.attn.to_qkv.weight" in names
    assert not any("textual" in name for name in names)


def test_dtype_and_second_save(saved: Path, tmp_path: Path) -> None:
    loaded = Gen3RPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    for name in COMPONENTS:
        assert {p.dtype for p in getattr(loaded, name).parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "again")
    assert (
        load_file(weights(tmp_path / "again", "wan_vae"))["model.conv1.weight"].dtype
        == torch.bfloat16
    )
    with pytest.raises(FileExistsError):
        loaded.save_pretrained(tmp_path / "again")


def test_large_components_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gen3r.checkpoint_save.MAX_SHARD", "300KB")
    original = build_nano()
    original.save_pretrained(tmp_path / "sharded")
    files = sorted(p.name for p in (tmp_path / "sharded" / "text_encoder").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert (
        tmp_path / "sharded/text_encoder/diffusion_pytorch_model.safetensors.index.json"
    ).exists()
    loaded = Gen3RPipeline.from_pretrained(tmp_path / "sharded", torch_dtype=torch.float32)
    for name in COMPONENTS:
        expected = getattr(original, name).state_dict()
        actual = getattr(loaded, name).state_dict()
        assert all(torch.equal(actual[k], expected[k]) for k in expected)


def test_every_problem_is_named_at_once(copy: Path) -> None:
    edit(weights(copy, "transformer"), **{"head.head.bias": None, "stranger": torch.zeros(2)})
    edit(weights(copy, "wan_vae"), **{"model.conv2.bias": torch.zeros(3)})
    edit(weights(copy, "text_encoder"), **{"norm.weight": None})
    shutil.rmtree(copy / "vggt")
    message = problems(copy)
    for part in (
        *("transformer: missing head.head.bias", "transformer: unexpected stranger [2]"),
        *("wan_vae: shape of model.conv2.bias is [3], expected [16]",),
        *("text_encoder: missing norm.weight", "vggt: folder"),
    ):
        assert part in message
    assert "5 problem(s)" in message


def test_tolerated_extras(copy: Path) -> None:
    edit(
        weights(copy, "transformer"),
        **{"ref_conv.weight": torch.zeros(2), "ref_conv.bias": torch.ones(2)},
    )
    edit(weights(copy, "vggt"), **{"track_head.norm.weight": torch.zeros(2)})
    edit(weights(copy, "clip_image_encoder"), **{"model.textual.norm.weight": torch.zeros(2)})
    assert all(report.ok for report in inspect_checkpoint(copy))


def test_truncated_file_is_named(copy: Path) -> None:
    path = weights(copy, "geo_adapter")
    path.write_bytes(path.read_bytes()[:1000])
    assert f"geo_adapter: {path.name} cannot be read" in problems(copy)


def test_bad_config_is_named(copy: Path) -> None:
    (copy / "transformer" / "config.json").write_text("{")
    assert "transformer: config.json is not JSON" in problems(copy)


def test_pickles_are_refused_unless_allowed(copy: Path) -> None:
    path = weights(copy, "wan_vae")
    torch.save(load_file(path), path.with_suffix(".pth"))
    path.unlink()
    assert "only pickle files" in problems(copy)
    loaded = Gen3RPipeline.from_pretrained(copy, torch_dtype=torch.float32, allow_pickle=True)
    expected = build_untrained().wan_vae.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.wan_vae.state_dict().items())


def test_standalone_names_without_prefix(copy: Path) -> None:
    path = weights(copy, "geo_adapter")
    state = {k.removeprefix("model."): v for k, v in load_file(path).items()}
    save_file({**state, "mean": torch.zeros(16), "std": torch.ones(16)}, path)
    assert all(report.ok for report in inspect_checkpoint(copy))


def test_neither_folder_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no local folder and could not be had"):
        resolve_checkpoint("nobody/nothing", local_files_only=True, cache_dir=tmp_path)


def test_hub_id_is_downloaded_once(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return str(saved)

    monkeypatch.setattr("gen3r.checkpoint.snapshot_download", snapshot)
    assert resolve_checkpoint("someone/gen3r", revision="v1") == saved
    assert asked == [("someone/gen3r", "v1")]


def test_real_layout_passes_the_check_and_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "sparse"
    write_sparse_checkpoint(folder)
    reports = {r.name: r for r in inspect_checkpoint(folder)}
    assert all(r.ok for r in reports.values()), [r.problems for r in reports.values()]
    assert len(reports["text_encoder"].files) == 2  # 11.4 GB in bf16
    broken = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with broken.open("r+b") as file:
        file.truncate(broken.stat().st_size - 1)
    after = {r.name: r for r in inspect_checkpoint(folder)}
    assert [n for n, r in after.items() if not r.ok] == ["transformer"]
    assert broken.name in after["transformer"].problems[0]


def test_real_shapes_load_at_their_size(tmp_path: Path) -> None:
    """The real VAE, streamed: 254 MB of holes become 254 MB of bf16 parameters."""
    from gen3r.checkpoint import inspect_component, load_component
    from gen3r_kernels import Backends

    folder = tmp_path / "sparse"
    write_sparse_checkpoint(folder)
    report = inspect_component("wan_vae", folder)
    module = load_component(report, torch.bfloat16, torch.device("cpu"), Backends())
    assert sum(p.numel() for p in module.parameters()) == 126_892_531


@pytest.mark.parametrize("name", list(COMPONENTS))
def test_expected_tensors_are_the_manifests(name: str) -> None:
    component = COMPONENTS[name]
    wanted = {n: s for n, s in manifest_shapes(name).items() if not component.is_tolerated(n)}
    assert component.expected(getattr(GEN3R, name)) == wanted
