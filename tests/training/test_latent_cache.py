"""The latent cache: what it holds is what would be encoded, and nothing breaks it unnoticed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r.causal_video import Posterior
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r_training.data import (
    CachedClip,
    CacheReport,
    LatentCacheConfig,
    Sample,
    SampleOrder,
    SampleStream,
    SceneDataset,
    Ticket,
    cache_files,
    encode_dataset,
    open_cache,
    open_dataset,
)
from gen3r_training.data.encoding import ClipEncoders, TextEncoder, encode_clip, encode_prompt
from gen3r_training.data.fingerprints import fingerprints
from gen3r_training.diffusion import encode_joint, keep_given_frames
from tests.training.plain_scenes import write_plain

CLIP = {"num_frames": 5, "resolution": 56, "max_stride": 2}
PROMPTS = ["", "A chair.", "A red car.", "It is a red car.", "The image shows a red car."]


@pytest.fixture(scope="module")
def pipeline() -> Gen3RPipeline:
    return build_nano()


@pytest.fixture(scope="module")
def checkpoint(pipeline: Gen3RPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(pipeline: Gen3RPipeline) -> ClipEncoders:
    p = pipeline
    return ClipEncoders(p.wan_vae, p.geo_adapter, p.vggt, p.clip_image_encoder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_plain(root / "train" / "a", 9, prompt="The image shows a red car.\nA chair.\n")
    write_plain(root / "train" / "b", 6, prompt=None)
    return root


def fill(
    checkpoint: Path,
    data: Path,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> CacheReport:
    given = {"data_root": (data,), "pretrained_path": checkpoint, "dtype": "float32"} | CLIP
    given |= {"cache_dir": data.parent / "cache", "clips_per_scene": 2, "num_workers": 0}
    config = LatentCacheConfig(**(given | options))
    return encode_dataset.encode_dataset(config, progress or (lambda *_: None))


def opened(data: Path, cached: bool = True) -> SceneDataset:
    cache = data.parent / "cache" if cached else None
    return open_dataset([data], "train", latent_cache=cache, **CLIP)


def fake_encoders(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
    """Encoders that need no model: a clip becomes the mean of its frames."""

    def clip(encoders: None, frames: Tensor, **options: bool) -> CachedClip:
        time.sleep(seconds)
        mean = frames.mean().view(1, 1)

        def posterior() -> Posterior:
            return Posterior(mean.clone(), mean.clone())

        control = {"1view": posterior(), "2view": posterior()}
        return CachedClip(posterior(), posterior(), control, {}, mean)

    class Whole:
        problems: tuple[str, ...] = ()

    monkeypatch.setattr(encode_dataset, "inspect_place", lambda *_: Whole)
    monkeypatch.setattr(encode_dataset, "fingerprints", lambda _, names: dict.fromkeys(names, "0"))
    monkeypatch.setattr(encode_dataset, "load_clip_encoders", lambda *_: None)
    monkeypatch.setattr(encode_dataset, "load_text_encoder", lambda *_: None)
    monkeypatch.setattr(encode_dataset, "encode_clip", clip)
    monkeypatch.setattr(encode_dataset, "encode_prompt", lambda _, text: torch.ones(len(text), 2))


def same(a: Posterior, b: Posterior) -> bool:
    return torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)


def cached_of(sample: Sample) -> CachedClip:
    assert sample.cached is not None
    return sample.cached


def test_a_cached_sample_is_the_encoded_one(
    checkpoint: Path, data: Path, encoders: ClipEncoders, pipeline: Gen3RPipeline
) -> None:
    seen: list[tuple[str, int, int]] = []
    report = fill(checkpoint, data, lambda *event: seen.append(event), num_workers=1)
    assert report.encoded + report.reused == len(open_cache(data.parent / "cache")) >= 3
    assert report.prompts == len(PROMPTS) and not report.failed
    assert seen[0] == ("encode prompts", 0, 5) and seen[-1][0] == "encode clips"
    assert seen[-1][1] == seen[-1][2]

    dataset, live = opened(data), opened(data)
    assert dataset.cache is not None and live.cache is not None
    live.cache._index.clear()  # so that the same ticket is read from its frames
    text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, 64)
    for ticket, task in ((Ticket(0, 0, 1, 0), "1view"), (Ticket(0, 1, 2, 1), "2view")):
        sample = dataset.fetch(ticket)
        with pytest.warns(UserWarning, match="not in the latent cache.*encoded anew"):
            read = live.fetch(ticket)
        assert sample.frames.shape == (0, 3, 56, 56) and read.frames.shape == (5, 3, 56, 56)
        assert torch.equal(sample.c2w, read.c2w)
        assert torch.equal(sample.intrinsics, read.intrinsics)
        assert (sample.prompt, sample.scene, sample.seed) == (read.prompt, read.scene, read.seed)
        assert sample.prompt in PROMPTS
        clip, fresh = cached_of(sample), encode_clip(encoders, read.frames[None], [task])
        assert clip.control_appearance.keys() == {"1view", "2view"} and not clip.control_geometry
        assert torch.equal(clip.image, fresh.image) and clip.tokens is None
        assert same(clip.control(task)[0], fresh.control(task)[0])
        assert clip.control(task)[1] is None
        for a, b in zip(clip.control("allview"), fresh.control("allview"), strict=True):
            assert a is not None and b is not None and same(a, b)
        assert clip.text is not None
        assert torch.equal(clip.text, encode_prompt(text, sample.prompt))
    assert dataset.cache.text("never seen") is None
    empty = dataset.cache.text("")
    assert empty is not None and torch.equal(empty, encode_prompt(text, ""))


def test_tokens_and_upstreams_control(checkpoint: Path, data: Path, encoders: ClipEncoders) -> None:
    shutil.rmtree(data / "train" / "a")
    fill(checkpoint, data, tokens=True, upstream_control_geometry=True, clips_per_scene=1)
    dataset, live = opened(data), opened(data)
    assert dataset.cache is not None and live.cache is not None
    live.cache._index.clear()
    assert cached_of(dataset.fetch(Ticket(0, 0, 0, 0))).tokens is None  # 1.6 GB at the real size
    dataset.cached_tokens = True
    clip = cached_of(dataset.fetch(Ticket(0, 0, 0, 0)))
    with pytest.warns(UserWarning):
        frames = live.fetch(Ticket(0, 0, 0, 0)).frames[None]
    joint = encode_joint(encoders.wan_vae, encoders.geo_adapter, encoders.vggt, frames)
    assert clip.tokens is not None and torch.equal(clip.tokens, joint.tokens)
    given = encode_joint(
        encoders.wan_vae, encoders.geo_adapter, encoders.vggt, keep_given_frames(frames, ["2view"])
    )
    appearance, geometry = clip.control("2view")
    assert geometry is not None
    assert same(appearance, given.appearance) and same(geometry, given.geometry)
    half = clip.to(torch.bfloat16)
    assert half.tokens is not None and half.tokens.dtype == torch.bfloat16
    assert half.control_geometry["1view"].mean.dtype == torch.bfloat16
    assert pickle.loads(pickle.dumps(clip)).control("1view")[1] is not None
    with pytest.raises(ValueError, match="'3view' of this clip is not encoded; encoded: 1view"):
        clip.control("3view")


def test_what_is_there_stays(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_encoders(monkeypatch)
    first = fill(checkpoint, data)
    monkeypatch.delattr(encode_dataset, "load_clip_encoders")  # nothing is loaded for nothing
    monkeypatch.delattr(encode_dataset, "load_text_encoder")
    again = fill(checkpoint, data)
    assert (again.encoded, again.reused, again.prompts) == (0, first.encoded + first.reused, 0)
    moved = data.rename(data.with_name("moved"))
    assert fill(checkpoint, moved).encoded == 0
    sample = opened(moved).fetch(Ticket(0, 0, 5, 0))
    assert sample.cached is not None


def test_damage_is_noticed_told_and_mended(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    total = fill(checkpoint, data).encoded
    folder = data.parent / "cache"
    clips = sorted((folder / "clips").rglob("*.safetensors"))
    raw = bytearray(clips[0].read_bytes())
    raw[-1] ^= 1
    clips[0].write_bytes(raw)
    clips[1].write_bytes(clips[1].read_bytes()[:9])
    texts = sorted((folder / "text").rglob("*.safetensors"))
    for path in texts:
        path.write_bytes(b"")
    dataset = opened(data)
    found = [dataset.fetch_noticed(Ticket(0, s, seed, 0)) for s in (0, 1) for seed in range(20)]
    notices = [notice for _, noticed in found for notice in noticed]
    assert {notice.kind for notice in notices} == {"cache"}
    assert any("checksum" in n.reason for n in notices)
    assert any("header" in n.reason for n in notices)
    assert all((s.cached is None) == (len(s.frames) == 5) for s, _ in found)
    assert all(s.cached.text is None for s, _ in found if s.cached is not None)
    assert dataset.cache is not None
    with pytest.raises(cache_files.DamagedEntry):
        dataset.cache.text("")

    report = fill(checkpoint, data)
    assert (report.encoded, report.reused) == (2, total - 2)
    assert report.damaged.keys() == {str(path) for path in [*clips[:2], *texts]}
    assert fill(checkpoint, data).damaged == {}
    assert opened(data).fetch_noticed(Ticket(0, 0, 3, 0))[1] == ()


def test_changed_frames_are_encoded_anew(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    fill(checkpoint, data)
    shutil.rmtree(data / "train" / "b")
    write_plain(data / "train" / "b", 6, (9, 8), prompt=None)
    sample, (notice,) = opened(data).fetch_noticed(Ticket(0, 1, 0, 0))
    assert sample.cached is None and "changed since" in notice.reason
    assert fill(checkpoint, data).encoded > 0
    assert opened(data).fetch_noticed(Ticket(0, 1, 0, 0))[1] == ()


def test_scenes_that_fail_are_reported(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    for frame in (data / "train" / "b" / "frames").iterdir():
        frame.write_bytes(b"")
    (data / "train" / "a" / "frames" / "004.png").write_bytes(b"")
    write_plain(data / "train" / "c").joinpath("cameras.json").unlink()
    report = fill(checkpoint, data, skip_bad_scenes=True, clips_per_scene=4)
    assert (
        report.failed.keys() == {"data/train/b"} and "can be read" in report.failed["data/train/b"]
    )
    assert report.skipped.keys() == {"data/train/c"}
    assert report.unreadable == {"data/train/a": 1}
    with pytest.raises(ValueError, match=r"no cameras.json.*--skip_bad_scenes"):
        fill(checkpoint, data)


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    def run() -> None:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def test_a_killed_writer_loses_one_clip(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    calls: list[str] = []
    real = os.replace

    def replace_or_die(source: str, target: Path) -> None:
        calls.append(str(target))
        if len(calls) == 1 + len(PROMPTS) + 2:  # the recipe, the prompts, one clip
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("gen3r_training.data.cache_files.os.replace", replace_or_die)
        process = in_child(lambda: fill(checkpoint, data))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    folder = data.parent / "cache"
    assert len(list(folder.rglob(".writing-*"))) == 1
    assert len(open_cache(folder)) == 1
    (index,) = (folder / "index").iterdir()
    with index.open("ab") as file:
        file.write(b'{"clip": "half a li')
    report = fill(checkpoint, data)
    assert report.reused == 1 and report.encoded > 0 and report.prompts == 0
    assert not list(folder.rglob(".writing-*"))
    assert len(open_cache(folder)) == report.reused + report.encoded


def test_two_writers_share_the_work(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch, seconds=0.05)
    for i in range(6):
        write_plain(data / "train" / f"more{i}", 5, (8, 9 + i))
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    writers = [
        in_child(lambda end=theirs: end.send(fill(checkpoint, data, num_workers=1)))
        for _, theirs in pipes
    ]
    reports = [ours.recv() for ours, _ in pipes]
    for writer in writers:
        writer.join(20)
    total = len(open_cache(data.parent / "cache"))
    assert [r.encoded + r.reused for r in reports] == [total, total]
    assert sum(r.encoded for r in reports) == total
    assert sum(r.prompts for r in reports) == len(PROMPTS)
    assert not reports[0].damaged and not reports[1].damaged


def test_a_stream_of_cached_samples(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    fill(checkpoint, data)
    dataset = opened(data)
    order = SampleOrder(dataset.counts, (), 0)
    with SampleStream(dataset, order, batch_size=2, num_workers=1) as stream:
        batches = [next(stream) for _ in range(3)]
    for g, sample in enumerate(s for batch in batches for s in batch):
        here = dataset.fetch(order.ticket(g))
        assert same(cached_of(sample).appearance, cached_of(here).appearance)
    assert not stream.notices


def test_one_folder_serves_one_recipe(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    first = fill(checkpoint, data, clips_per_scene=1)
    assert fill(checkpoint, data, clips_per_scene=3).reused >= first.encoded
    folder = data.parent / "cache"
    for option, value, name in (
        ("resolution", 112, "resolution"),
        ("dtype", "bfloat16", "dtype"),
        ("tokens", True, "tokens"),
    ):
        with pytest.raises(ValueError, match=rf"another recipe \({name} differ\)"):
            fill(checkpoint, data, **{option: value})
    with pytest.raises(ValueError, match="no latent cache and not empty"):
        fill(checkpoint, data, cache_dir=data)
    with pytest.raises(ValueError, match=r"no recipe.json; run gen3r-engine prepare latents"):
        open_cache(data)
    with pytest.raises(ValueError, match=r"--max_stride 1: the latent cache .* made with 2"):
        open_dataset([data], "train", latent_cache=folder, **(CLIP | {"max_stride": 1}))
    with pytest.raises(ValueError, match="made without --tokens"):
        open_dataset([data], "train", latent_cache=folder, cached_tokens=True, **CLIP)
    values = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(values | {"format": "of tomorrow"}))
    with pytest.raises(ValueError, match="format 'of tomorrow'"):
        open_cache(folder)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        open_cache(folder)


def test_other_weights_are_refused(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    other = data.parent / "adapter"
    shutil.copytree(checkpoint / "geo_adapter", other)
    (file,) = other.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    monkeypatch.setattr(encode_dataset, "fingerprints", fingerprints)
    fill(checkpoint, data, geo_adapter=other)
    cache = open_cache(data.parent / "cache")
    places = {name: checkpoint / name for name in cache.recipe.weights}
    cache.check_weights(places | {"geo_adapter": other}, dtype=torch.float32)
    cache.check_weights({"geo_adapter": file}, dtype=torch.float32)
    with pytest.raises(ValueError, match="other weights of geo_adapter"):
        cache.check_weights(places, dtype=torch.float32)
    with pytest.raises(ValueError, match="holds float32, the run computes in bfloat16"):
        cache.check_weights(places, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="without --upstream_control_geometry"):
        cache.check_weights(places, dtype=torch.float32, control_geometry=True)
    with pytest.raises(ValueError, match="there are no weights"):
        cache.check_weights({"vggt": data}, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"geo_adapter differ"):
        fill(checkpoint, data)


def test_a_full_disk_leaves_nothing_behind(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_encoders(monkeypatch)
    fill(checkpoint, data)
    before = sorted((data.parent / "cache").rglob("*"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gen3r_training.data.cache_files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache_files.write_entry(data.parent / "cache" / "clips" / "x", {"a": torch.ones(1)})
    with pytest.raises(OSError, match="No space left"):
        fill(checkpoint, data, clips_per_scene=9)
    assert sorted((data.parent / "cache").rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data_root", (), "--data_root"),
        ("resolution", 100, "--resolution 100"),
        ("num_frames", 4, "--num_frames 4"),
        ("max_stride", 0, "--max_stride 0"),
        ("clips_per_scene", 0, "--clips_per_scene 0"),
        ("seed", -1, "--seed -1"),
        ("num_workers", -1, "--num_workers -1"),
        ("dtype", "float16", "--dtype 'float16' is unknown; known: float32, bfloat16"),
        ("device", "tpu", "--device 'tpu'"),
        ("split", "test", "--split 'test'"),
    ],
)
def test_bad_options(option: str, value: object, message: str) -> None:
    config = LatentCacheConfig(data_root=(Path("d"),), pretrained_path="p", cache_dir=Path("c"))
    with pytest.raises(ValueError, match=message):
        replace(config, **{option: value})  # type: ignore[arg-type]


def test_a_checkpoint_that_lacks_something(checkpoint: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"wan_vae in .*folder .* is missing"):
        fill(data, data)
    with pytest.raises(ValueError, match="is not a folder"):
        fill(data / "nowhere", data)
