"""Engine on the embedded model: the pipeline's results, in order, streamed, batched, cancelled."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import gen3r_engine
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import Scene, SceneRequest
from gen3r_engine import Engine, EngineConfig
from gen3r_engine.denoiser import Cancelled
from gen3r_engine.events import Event, SceneError

SMALL = {"num_frames": 5, "height": 56, "width": 56}
# Relative: batched and single matrix products round differently. Measured with the embedded
# weights: 2.4e-5 of VGGT's confidence, which is an exponential, and less of all else.
FLOOR = 1e-4


@cache
def engine(**settings: Any) -> Engine:
    return Engine.load(None, EngineConfig(device="cpu", **settings))


@cache
def pipeline() -> Gen3RPipeline:
    return build_nano()


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, 60, 70, 3), dtype=np.uint8))


def requests() -> list[SceneRequest]:
    return [
        SceneRequest(images(1), "a red room", cameras="zoom_in", seed=1, **SMALL),
        SceneRequest(images(2), "", seed=2, **SMALL),
        SceneRequest(images(7), "a hall", negative_prompt="", seed=3, **SMALL),
    ]


@cache
def solo() -> list[Scene]:
    """What the plain pipeline makes of every request alone."""
    return [pipeline()(requests=[r], num_inference_steps=2)[0] for r in requests()]


def check_same(scene: Scene, expected: Scene) -> None:
    assert (scene.rgb.int() - expected.rgb.int()).abs().max() <= 1  # truncation of equal values
    assert torch.equal(scene.mask, expected.mask)
    for name in ("depth", "depth_confidence", "extrinsics", "intrinsics", "points"):
        ours, theirs = getattr(scene, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() <= FLOOR * theirs.abs().max(), name


def test_public_names() -> None:
    assert set(gen3r_engine.__all__) == {"Engine", "EngineConfig", "SceneRequest"}
    assert gen3r_engine.SceneRequest is SceneRequest
    with pytest.raises(AttributeError, match="no attribute 'Turbo'"):
        gen3r_engine.Turbo  # noqa: B018


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_scene_equals_the_plain_pipelines(batch: int, overlap: bool) -> None:
    scenes = engine(max_batch=batch, overlap=overlap).generate(requests(), steps=2)
    assert [s.info["index"] for s in scenes] == [0, 1, 2]
    assert [s.info["batch"] for s in scenes] == {1: [1] * 3, 2: [2, 2, 1], 3: [3] * 3}[batch]
    for scene, expected in zip(scenes, solo(), strict=True):
        check_same(scene, expected)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solvers_and_no_guidance(solver: str) -> None:
    (request, *_) = requests()
    (scene,) = engine().generate(request, steps=3, solver=solver, guidance=1.0)
    (expected,) = pipeline()(
        requests=[request], num_inference_steps=3, solver=solver, guidance_scale=1.0
    )
    check_same(scene, expected)


def test_noise_may_be_given() -> None:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 16, 2, 8, 16, generator=generator)
    draws = torch.randn(3, 16, 2, 7, 7, generator=generator)
    given = {"latents": latents, "posterior_noise": draws}
    scenes = engine().generate(requests(), steps=2, **given)
    expected = pipeline()(requests=requests(), num_inference_steps=2, **given)
    for scene, other in zip(scenes, expected, strict=True):
        check_same(scene, other)


def test_shapes_may_be_mixed_and_point_maps_asked() -> None:
    mixed = [*requests()[:2], SceneRequest(images(1), num_frames=9, height=56, width=112)]
    scenes = engine(max_batch=2).generate(mixed, steps=1, point_maps=True)
    assert [tuple(s.depth.shape) for s in scenes] == [(5, 56, 56), (5, 56, 56), (9, 56, 112)]
    assert all(s.point_map is not None and s.point_map.shape == s.points.shape for s in scenes)


def test_facts_of_a_scene() -> None:
    (scene,) = engine().generate(requests()[0], steps=2, guidance=3.0)
    plain = solo()[0].info
    assert set(plain) <= set(scene.info)
    assert set(scene.info["seconds"]) == set(plain["seconds"])
    assert (scene.info["steps"], scene.info["guidance_scale"]) == (2, 3.0)
    assert (scene.info["preset"], scene.info["compile_cache"]) == ("exact", "none")


def test_prompts_are_encoded_once() -> None:
    own = Engine.load(None, EngineConfig(device="cpu"))
    seen: list[int] = []
    own.pipeline.text_encoder.register_forward_hook(lambda *a: seen.append(1))
    own.generate(requests(), steps=1)
    assert len(seen) == 4, "bad detailed, a red room, a hall, and the empty text once"
    own.generate(requests(), steps=1)
    assert len(seen) == 4


def test_stream_gives_scenes_while_later_ones_are_made() -> None:
    events: list[Event] = []
    scenes = engine().stream(requests() * 2, steps=2, on_event=events.append)
    first = next(scenes)
    assert first.info["index"] == 0
    begun = {e.index for e in events if e.stage == "denoise"}
    assert 1 in begun, "the second scene is on its way"
    rest = list(scenes)
    assert [s.info["index"] for s in rest] == [1, 2, 3, 4, 5]
    finished = [e.index for e in events if e.kind == "finished"]
    assert finished == [0, 1, 2, 3, 4, 5]
    last = {e.index: e.done for e in events if e.stage == "denoise"}
    assert last == {i: 2 for i in range(6)}


def test_progress_of_one_scene() -> None:
    told: list[tuple[str, int, int]] = []
    engine().generate(requests()[0], steps=3, progress=lambda *event: told.append(event))
    assert [e for e in told if e[0] == "denoise"][-2:] == [("denoise", 3, 3)] * 2
    begun = [stage for stage, done, _ in told if done == 0]
    assert list(dict.fromkeys(begun)) == list(solo()[0].info["seconds"])


@pytest.mark.parametrize("overlap", [True, False])
def test_leaving_the_loop_stops_the_work(overlap: bool) -> None:
    before = threading.active_count()
    own = engine(overlap=overlap)
    for scene in own.stream(requests() * 3, steps=2):
        assert scene.info["index"] == 0
        break
    assert threading.active_count() == before
    assert len(own.generate(requests()[0], steps=1)) == 1, "the engine is free again"


@pytest.mark.parametrize("overlap", [True, False])
def test_cancel_from_another_thread(overlap: bool) -> None:
    own = engine(overlap=overlap)
    kinds: list[str] = []

    def watch(event: Event) -> None:
        kinds.append(event.kind)
        if event.stage == "denoise" and event.index == 1 and event.done == 1:
            threading.Thread(target=own.cancel).start()

    got = []
    with pytest.raises(Cancelled):
        for scene in own.stream(requests() * 2, steps=200, on_event=watch):
            got.append(scene.info["index"])
    assert got in ([0], []) and kinds[-1] == "cancelled"
    check_same(own.generate(requests()[1], steps=2)[0], solo()[1])


def test_one_call_at_a_time() -> None:
    scenes = engine().stream(requests(), steps=1)
    next(scenes)
    with pytest.raises(RuntimeError, match="at work on another call"):
        engine().generate(requests()[0], steps=1)
    list(scenes)


def test_a_failed_scene_does_not_lose_the_finished_ones() -> None:
    for overlap in (True, False):
        own = Engine.load(None, EngineConfig(device="cpu", overlap=overlap))
        original, calls = own.denoiser.run, []

        def failing(*args: Any, original: Any = original, calls: Any = calls) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("shapes differ")
            return original(*args)

        own.denoiser.run = failing  # type: ignore[method-assign]
        got, kinds = [], []
        with pytest.raises(SceneError, match="request 2 failed while 'denoise' ran: ValueError"):
            for scene in own.stream(
                requests() * 2, steps=1, on_event=lambda e, k=kinds: k.append(e.kind)
            ):
                got.append(scene)
        for scene, expected in zip(got, own.generate(requests()[:2], steps=1), strict=True):
            check_same(scene, expected)
        assert kinds[-1] == "failed"


def test_refusals() -> None:
    (request, *_) = requests()
    for settings, message in (
        ({"steps": 0}, "num_inference_steps 0"),
        ({"solver": "heun"}, "solver 'heun'"),
    ):
        with pytest.raises(ValueError, match=message):
            engine().stream(request, **settings)
    with pytest.raises(ValueError, match="no requests"):
        engine().stream([])
    with pytest.raises(ValueError, match="preset 'turbo' is unknown"):
        Engine.load(None, "turbo")


def test_warm_up() -> None:
    assert set(engine(max_batch=2).warm_up(5, 56)) == {"first", "step", "stages"}
    assert set(engine().warm_up(9, (56, 112), 1)) == {"first", "step", "stages"}
    with pytest.raises(ValueError, match="batch 3 is not within 1 to max_batch 2"):
        engine(max_batch=2).warm_up(5, 56, 3)
    with pytest.raises(ValueError, match="use 5 or 9"):
        engine().warm_up(6, 56)


def test_an_engine_of_a_pipeline() -> None:
    own = Engine.of(build_nano(), EngineConfig(device="cpu"))
    check_same(own.generate(requests()[2], steps=2)[0], solo()[2])
    with pytest.raises(ValueError, match=r"is in torch.bfloat16, the config asks for float32"):
        Engine.of(build_nano(torch.bfloat16), EngineConfig(device="cpu"))
