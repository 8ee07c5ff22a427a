"""The pipeline around the model: batches, sizes, seeds, callbacks, what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen3r import stages
from gen3r.cameras import trajectory
from gen3r.nano import NANO, build_nano
from gen3r.pipeline import STAGES, Gen3RPipeline
from gen3r.scene import Cameras, Scene, SceneRequest

SMALL = {"num_frames": 5, "height": 56, "width": 56}
# Relative: batched and single matrix products round differently. Measured with the embedded
# weights: 2.4e-5 of VGGT's confidence, which is an exponential, and less of all else.
FLOOR = 1e-4


@cache
def pipeline() -> Gen3RPipeline:
    return build_nano()


def images(count: int, height: int = 60, width: int = 70) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def path(frames: int) -> Cameras:
    c2w = trajectory("arc_left", frames).double()
    k = torch.tensor([[60.0, 0, 28], [0, 60, 28], [0, 0, 1]]).expand(frames, 3, 3)
    return Cameras(torch.linalg.inv(c2w), k)


def run(request: SceneRequest, **options: Any) -> Scene:
    scenes = pipeline()(requests=[request], **{"num_inference_steps": 2, **options})
    assert isinstance(scenes, list)
    return scenes[0]


def close(actual: Tensor, expected: Tensor, bound: float = FLOOR) -> bool:
    return bool((actual - expected).abs().max() <= bound * expected.abs().max())


def test_a_batch_of_all_tasks_equals_its_members() -> None:
    requests = [
        SceneRequest(images(1), "a red room", cameras="zoom_in", seed=1, **SMALL),
        SceneRequest(images(2), "", cameras=path(5), seed=2, **SMALL),
        SceneRequest(images(7), "a hall", negative_prompt="", seed=3, **SMALL),
        SceneRequest(images(1, 90, 61), "a hall", cameras="free", seed=4, **SMALL),
    ]
    together = pipeline()(requests=requests, num_inference_steps=2)
    for request, scene in zip(requests, together, strict=True):
        alone = run(request)
        assert (scene.rgb.int() - alone.rgb.int()).abs().max() <= 1  # truncation of equal values
        for name in ("depth", "depth_confidence", "extrinsics", "intrinsics", "points"):
            assert close(getattr(scene, name), getattr(alone, name)), name


@pytest.mark.parametrize(("height", "width"), [(56, 56), (168, 168), (112, 56), (56, 168)])
@pytest.mark.parametrize("frames", [5, 9])
def test_multiples_of_56_and_of_4_plus_1(height: int, width: int, frames: int) -> None:
    request = SceneRequest(
        images(1), cameras="arc_left", num_frames=frames, height=height, width=width
    )
    scene = run(request, num_inference_steps=1)
    assert scene.rgb.shape == (frames, height, width, 3) and scene.rgb.dtype == torch.uint8
    assert scene.depth.shape == scene.depth_confidence.shape == (frames, height, width)
    assert scene.points.shape == (frames, height, width, 3)
    assert scene.mask.shape == (frames, height, width)
    assert scene.extrinsics.shape == (frames, 4, 4) and scene.intrinsics.shape == (frames, 3, 3)
    assert scene.depth.isfinite().all() and scene.point_map is None


def test_one_frame_from_one_view() -> None:
    scene = run(SceneRequest(images(1), num_frames=1, height=56, width=56), num_inference_steps=1)
    assert scene.rgb.shape == (1, 56, 56, 3)


def test_an_odd_latent_grid_is_padded_and_cropped() -> None:
    assert stages.latent_shape(5, 56, 168) == (16, 2, 8, 44)
    assert stages.latent_shape(49, 560, 560) == (16, 13, 70, 140)
    joint = torch.arange(8 * 44.0).view(1, 1, 1, 8, 44)
    appearance, geometry = stages.split_latents(joint, 56, 168)
    assert appearance.shape == geometry.shape == (1, 1, 1, 7, 21)
    assert appearance[..., 0, 0].item() == 0 and geometry[..., 0, 0].item() == 22


def test_seeds_decide_and_repeat() -> None:
    first, again, other = (run(SceneRequest(images(1), seed=s, **SMALL)) for s in (7, 7, 8))
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.depth, again.depth)
    assert not torch.equal(first.rgb, other.rgb)


def test_a_generator_replaces_the_seed() -> None:
    request = SceneRequest(images(1), seed=7, **SMALL)
    seeded = run(request)
    given = run(SceneRequest(images(1), **SMALL), generator=torch.Generator().manual_seed(7))
    assert torch.equal(seeded.rgb, given.rgb)
    with pytest.raises(ValueError, match="2 generators for 1 requests"):
        run(request, generator=[torch.Generator(), torch.Generator()])


def test_text_cameras_and_guidance_matter() -> None:
    plain = run(SceneRequest(images(1), "a red room", **SMALL))
    for other in (
        run(SceneRequest(images(1), "a blue hall", **SMALL)),
        run(SceneRequest(images(1), "a red room", cameras=path(5), **SMALL)),
        run(SceneRequest(images(1), "a red room", **SMALL), guidance_scale=1.0),
        run(SceneRequest(images(1), "a red room", **SMALL), solver="unipc"),
        run(SceneRequest(images(1), "a red room", **SMALL), solver="dpm++"),
    ):
        assert not close(other.depth, plain.depth, 1e-7)


def test_only_built_in_moves_run_vggt_on_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = stages.bootstrap
    monkeypatch.setattr(stages, "bootstrap", lambda *a: calls.append(1) or original(*a))
    for request, expected in (
        (SceneRequest(images(1), cameras="free", **SMALL), 0),
        (SceneRequest(images(2), cameras=path(5), **SMALL), 0),
        (SceneRequest(images(5), cameras="zoom_in", **SMALL), 0),  # allview takes no cameras
        (SceneRequest(images(2), cameras="zoom_in", **SMALL), 1),
    ):
        calls.clear()
        run(request, num_inference_steps=1)
        assert len(calls) == expected, request.task


def test_progress_and_callback() -> None:
    events: list[tuple[str, int, int]] = []
    steps: list[int] = []

    def on_step(
        pipe: Any, step: int, timestep: float, kept: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        steps.append(step)
        return {"latents": torch.zeros_like(kept["latents"])}

    latents = pipeline()(
        prompt="a room",
        images=images(1)[0],
        **SMALL,
        num_inference_steps=3,
        output_type="latent",
        progress=lambda *event: events.append(event),
        callback_on_step_end=on_step,
    )
    assert isinstance(latents, Tensor) and not latents.any()
    assert steps == [0, 1, 2]
    assert [s for s, done, _ in events if done == 0] == list(STAGES[:3])
    assert ("denoise", 3, 3) in events
    scene = run(SceneRequest(images(1), **SMALL))
    assert set(scene.info["seconds"]) == set(STAGES)


def test_point_maps_only_when_asked() -> None:
    scene = run(SceneRequest(images(1), **SMALL), point_maps=True, num_inference_steps=1)
    assert scene.point_map is not None and scene.point_confidence is not None
    assert scene.point_map.shape == scene.points.shape


def test_defaults_come_from_the_model() -> None:
    latents = pipeline()(images=images(1), num_inference_steps=1, output_type="latent")
    shape = stages.latent_shape(NANO.num_frames, NANO.size, NANO.size)
    assert isinstance(latents, Tensor) and latents.shape == (1, *shape)


def test_refusals() -> None:
    request = SceneRequest(images(1), **SMALL)
    larger = SceneRequest(images(1), num_frames=5, height=112, width=112)
    for options, message in (
        ({"requests": [request, larger]}, "must agree in frames"),
        ({"requests": []}, "no requests"),
        ({}, "no images"),
        ({"requests": [request], "output_type": "video"}, "output_type 'video'"),
        ({"requests": [request], "solver": "heun"}, "solver 'heun'"),
        ({"requests": [request], "num_inference_steps": 0}, "num_inference_steps 0"),
        ({"requests": [request], "latents": torch.zeros(1, 16, 2, 7, 14)}, "latents has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline()(**options)


def test_an_infinite_focal_length_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    head = pipeline().vggt.camera_head
    closed = torch.zeros(1, 5, 9)
    closed[..., 6] = 1
    monkeypatch.setattr(head, "forward", lambda tokens: [closed])
    assert not run(SceneRequest(images(1), **SMALL), num_inference_steps=1).mask.any()
