"""Engine on a GPU: captured and compiled, beside each other and in every tier, as the pipeline."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gen3r.nano import build_untrained
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import Scene, SceneRequest
from gen3r_engine import Engine, EngineConfig
from gen3r_engine.denoiser import Cancelled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SMALL = {"num_frames": 9, "height": 112, "width": 112}


def requests() -> list[SceneRequest]:
    images = list(np.random.default_rng(0).integers(0, 256, (9, 60, 70, 3), dtype=np.uint8))
    return [
        SceneRequest(images[:1], "a red room", cameras="zoom_in", seed=1, **SMALL),
        SceneRequest(images[:2], "", seed=2, **SMALL),
        SceneRequest(images, "a hall", seed=3, **SMALL),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights, which hardly enlarge rounding: the bounds below are for them."""
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    build_untrained().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Scene]:
    """What the plain pipeline makes of every request alone, in the same dtype on the same GPU."""
    pipeline = Gen3RPipeline.from_pretrained(model, torch_dtype=torch.bfloat16, device="cuda")
    return [pipeline(requests=[r], num_inference_steps=4)[0] for r in requests()]


def check_close(scenes: list[Scene], others: list[Scene], bound: float) -> None:
    for scene, other in zip(scenes, others, strict=True):
        for name in ("depth", "depth_confidence", "extrinsics", "intrinsics"):
            ours, theirs = getattr(scene, name), getattr(other, name)
            assert not ours.is_cuda and not ours.is_pinned()
            assert (ours - theirs).abs().max() <= bound * theirs.abs().max(), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_scenes_are_the_pipelines(
    model: Path, expected: list[Scene], tmp_path: Path, compiled: bool, overlap: bool
) -> None:
    config = EngineConfig(compiled=compiled, overlap=overlap, cache_dir=tmp_path)
    engine = Engine.load(model, config)
    scenes = engine.generate(requests(), steps=4)
    # Compiled code rounds elsewhere; 2^-8 is one rounding of bf16.
    check_close(scenes, expected, 2**-6 if compiled else 2**-8)
    captures = engine.denoiser.captures
    again = engine.generate(requests(), steps=4)
    check_close(again, scenes, 0.0)
    assert engine.denoiser.captures == captures, "a known shape is not captured again"
    assert "compile" in scenes[0].info["seconds"] and "compile" not in again[0].info["seconds"]


@pytest.mark.parametrize("tier", ["24gb", "12gb"])
def test_tiers(model: Path, expected: list[Scene], tmp_path: Path, tier: str) -> None:
    engine = Engine.load(model, EngineConfig(residency=tier, compiled=False, cache_dir=tmp_path))
    check_close(engine.generate(requests(), steps=4), expected, 2**-6)


def test_other_threads_may_use_the_gpu_meanwhile(
    model: Path, expected: list[Scene], tmp_path: Path
) -> None:
    """Copies, allocations and synchronisation elsewhere disturb neither capture nor result."""
    engine, stop = Engine.load(model, EngineConfig(compiled=False, cache_dir=tmp_path)), []

    def work() -> None:
        while not stop:
            torch.ones(1 << 20, device="cuda").mul(2).cpu()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        check_close(engine.generate(requests(), steps=4), expected, 2**-8)
    finally:
        stop.append(1)
        thread.join()


def test_cancel_and_go_on(model: Path, expected: list[Scene], tmp_path: Path) -> None:
    engine = Engine.load(model, EngineConfig(compiled=False, cache_dir=tmp_path))
    timer = threading.Timer(3.0, engine.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        engine.generate(requests(), steps=20_000)
    timer.cancel()
    check_close(engine.generate(requests(), steps=4), expected, 2**-8)


def test_memory_returns(model: Path, tmp_path: Path) -> None:
    engine = Engine.load(model, EngineConfig(compiled=False, cache_dir=tmp_path))
    engine.generate(requests(), steps=2)
    used = torch.cuda.memory_allocated()
    for _ in range(3):
        engine.generate(requests(), steps=2)
    assert torch.cuda.memory_allocated() <= used
