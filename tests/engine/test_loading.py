"""Loading for the engine: the same model, checked first, without the text encoder until asked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from gen3r.checkpoint import CheckpointError, checked_reports
from gen3r.nano import NANO, build_nano
from gen3r.pipeline import MODULES
from gen3r.precision import FP8
from gen3r_engine import loading
from gen3r_engine.caches import VARIABLES
from gen3r_engine.config import EngineConfig
from gen3r_engine.loading import LoadedModel, fingerprint_files, load_pipeline
from gen3r_engine.residency import LazyModule


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    build_nano().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weights(folder: Path, component: str) -> Path:
    (path,) = (folder / component).glob("*.safetensors")
    return path


def lazy(model: LoadedModel) -> LazyModule:
    encoder = model.pipeline.text_encoder
    assert isinstance(encoder, LazyModule)
    return encoder


def test_a_folder_gives_the_model_that_was_saved(saved: Path) -> None:
    model, expected = load_pipeline(saved), build_nano()
    assert model.pipeline.config == NANO
    assert model.pipeline.untrained is expected.untrained
    assert not lazy(model).loaded
    for name in MODULES:
        if name == "text_encoder":
            continue
        state = getattr(expected, name).state_dict()
        found = getattr(model.pipeline, name).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], state[k]) for k in state)
    assert not lazy(model).loaded
    with model.residency.use("text_encoder") as encoder:
        state, found = expected.text_encoder.state_dict(), encoder.state_dict()
        assert all(torch.equal(found[k], state[k]) for k in state)
        assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert set(model.seconds) == {"check", "read", "apply preset"}


def test_bf16_and_the_embedded_model(saved: Path) -> None:
    config = EngineConfig(dtype="bfloat16")
    folder, embedded = load_pipeline(saved, config), load_pipeline(None, config)
    for name in ("transformer", "vggt", "clip_image_encoder"):
        a = getattr(folder.pipeline, name).state_dict()
        b = getattr(embedded.pipeline, name).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert embedded.pipeline.dtype == torch.bfloat16 and embedded.choice.dtype == "bfloat16"
    assert folder.residency.weights_gib() == embedded.residency.weights_gib()


def test_lazy_text_encoder_serves_the_plain_pipeline(saved: Path) -> None:
    model = load_pipeline(saved)
    ids = torch.tensor([[3, 5, 1]])
    expected = build_nano().text_encoder(input_ids=ids).last_hidden_state
    found = model.pipeline.text_encoder(input_ids=ids).last_hidden_state
    assert torch.equal(found, expected)


def test_everything_is_checked_before_anything_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "fill_component", lambda *_: pytest.fail("a weight was read"))
    shutil.rmtree(copy / "vggt")
    path = weights(copy, "transformer")
    state = load_file(path)
    del state["head.head.bias"]
    save_file(state, path)
    with pytest.raises(CheckpointError) as error:
        load_pipeline(copy)
    for part in ("2 problem(s)", "vggt: folder", "transformer: missing head.head.bias"):
        assert part in str(error.value)


def test_an_error_of_one_component_comes_up(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.fill_component

    def fill(module, report, *rest):  # type: ignore[no-untyped-def]
        if report.name in ("vggt", "text_encoder"):
            raise CheckpointError(f"{report.name} ends after 10 bytes")
        return real(module, report, *rest)

    monkeypatch.setattr(loading, "fill_component", fill)
    with pytest.raises(CheckpointError, match="vggt ends"):
        load_pipeline(copy)


def test_a_text_encoder_that_fails_is_tried_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pipeline(saved)
    real = loading.fill_component

    def fail(*_: object) -> None:
        raise CheckpointError("text_encoder ends after 10 bytes")

    monkeypatch.setattr(loading, "fill_component", fail)
    with pytest.raises(CheckpointError, match="ends after"), model.residency.use("text_encoder"):
        pass
    monkeypatch.setattr(loading, "fill_component", real)
    with model.residency.use("text_encoder") as encoder:
        assert torch.isfinite(encoder.shared.weight).all()


def test_presets_are_applied_and_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="preset 'fp8' needs a GPU"):
        load_pipeline(saved, EngineConfig(preset="fp8"))
    model = load_pipeline(saved, EngineConfig(preset="fp8", device="cpu"))
    assert model.choice.precision == FP8
    plain = load_pipeline(saved).pipeline.transformer
    assert type(model.pipeline.transformer.blocks[1].ffn[0]) is not type(plain.blocks[1].ffn[0])


def test_neither_folder_nor_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_pipeline(tmp_path / "nowhere")


def test_a_cpu_leaves_the_compilers_folders_alone(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    load_pipeline(saved, EngineConfig(cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_fingerprint_follows_encoder_and_tokenizer(saved: Path, copy: Path) -> None:
    def fingerprint(folder: Path) -> str:
        report = {r.name: r for r in checked_reports(folder)}["text_encoder"]
        return fingerprint_files(folder, report)

    shutil.copystat(weights(saved, "text_encoder"), weights(copy, "text_encoder"))
    first = fingerprint(saved)
    assert fingerprint(copy) == first  # another place, the same content
    path = weights(copy, "text_encoder")
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(copy) != first  # by its time of change
    data[-1] ^= 1
    state = load_file(path)
    save_file({n: t + 1 if n == "norm.weight" else t for n, t in state.items()}, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(copy) != first  # by its values
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(copy) == first
    config = copy / "tokenizer" / "tokenizer.json"
    config.write_text(config.read_text() + " ")
    assert fingerprint(copy) != first
    assert load_pipeline(None).fingerprint == load_pipeline(None).fingerprint


def test_real_layout_without_its_text_encoder(tmp_path: Path) -> None:
    """The published layout's smallest component by chunks of holes, at its real size."""
    from gen3r.checkpoint import build_component, fill_component, inspect_component
    from gen3r_engine.reading import ParallelReader
    from gen3r_kernels import Backends

    folder = tmp_path / "sparse"
    write_sparse_checkpoint(folder)
    report = inspect_component("wan_vae", folder)
    built = build_component(report, Backends())
    with ParallelReader(torch.bfloat16, threads=2) as read:
        module = fill_component(built, report, torch.bfloat16, torch.device("cpu"), read)
    assert sum(p.numel() for p in module.parameters()) == 126_892_531
