"""e2e: the complete tiny pipeline against upstream's, from prompts and images to points."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r import stages
from gen3r.cameras import invert_pose
from gen3r.encoders import to_uint8
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import Cameras, Scene, SceneRequest
from gen3r.transformer import Conditions
from tests.golden_fixtures.golden import END_TO_END_TOLERANCE, Golden, relative_error
from tests.golden_fixtures.tiny_pipeline import build_pipeline, enlarge

KIND = "e2e"
SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowUniPCMultistepScheduler": "unipc",
    "FlowDPMSolverMultistepScheduler": "dpm++",
}


def case_names(golden: Golden) -> list[str]:
    return [c for c in golden.meta["cases"] if f"{c}/in/control_u8" in golden]


def request_of(golden: Golden, case: str) -> SceneRequest:
    meta = golden.meta["cases"][case]
    frames = meta["num_frames"]
    cameras: Any = "free"
    if meta["camera"] != "free":
        c2w = golden[f"{case}/in/c2ws"].double()
        cameras = Cameras(invert_pose(c2w), golden[f"{case}/in/Ks"])
    return SceneRequest(
        images=list(enlarge(golden[f"{case}/in/control_u8"], meta["height"])),
        prompt=meta["prompt"],
        task="allview" if meta["n_control"] > 2 else f"{meta['n_control']}view",
        cameras=cameras,
        num_frames=frames,
        height=meta["height"],
        width=meta["width"],
        negative_prompt=meta["negative_prompt"],
    )


def sampled(golden: Golden, name: str, actual: Tensor) -> tuple[Tensor, Tensor]:
    """`actual` at the stored positions, and the stored result."""
    found = golden.stored(name)
    assert found is not None, name
    return actual[..., :: found[1], :: found[1]], golden[found[0]]


@torch.no_grad()
def test_wrong_variants(golden: Golden) -> None:
    """What is easily got wrong must miss the first step's prediction or the control latents."""
    case = case_names(golden)[0]
    meta, shared = golden.meta["cases"][case], f"shared_F{golden.meta['cases'][case]['num_frames']}"
    pipeline = build_pipeline(golden.sibling("e2e_weights"))
    transformer, calls = pipeline.transformer, []
    transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    pipeline(
        requests=[request_of(golden, case)],
        num_inference_steps=1,
        latents=golden[f"{shared}/noise"],
        posterior_noise=golden[f"{shared}/vae_posterior_noise"],
        solver=SOLVERS[meta["scheduler"]],
        output_type="latent",
    )
    latents, times, conditions = calls[0]
    row = Conditions(*(v if v is None else v[1:] for v in vars(conditions).values()))

    def error(rows: Conditions, side_by_side: bool) -> float:
        velocity = transformer(latents[1:], times[1:], rows, side_by_side)
        return relative_error(*sampled(golden, f"{case}/mid/noise_pred_text_step0", velocity))

    assert error(row, True) < END_TO_END_TOLERANCE
    assert error(row, False) > 10 * END_TO_END_TOLERANCE, "plain rotary table"
    text = golden[f"{case}/mid/context_1"][None]
    masked = dataclasses.replace(row, text=transformer.text_embedding(text))
    assert error(masked, True) > 10 * END_TO_END_TOLERANCE, "masked text padding"

    control = conditions.control[:1].clone()
    half, channels = control.shape[-1] // 2, golden[f"{shared}/noise"].shape[1]
    view = control[:, :channels, ..., :half]
    view.copy_(pipeline.wan_vae.unscale(view.clone()))
    wrong = relative_error(*sampled(golden, f"{case}/mid/control_latents", control))
    assert wrong > 10 * END_TO_END_TOLERANCE, "unscaled latents"


class Watch:
    """Keeps what the pipeline's parts were given and returned, and the latents of every step."""

    def __init__(self, pipeline: Gen3RPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, Any] = {}
        self.latents: list[Tensor] = []
        self.velocity: Tensor | None = None

        def condition(text: Any, image: Any, control: Any, cameras: Any) -> Conditions:
            self.seen.update(text=text, image=image, control=control, cameras=cameras)
            return type(pipeline.transformer).condition(
                pipeline.transformer, text, image, control, cameras
            )

        def first_velocity(module: Any, args: Any, out: Tensor) -> None:
            self.velocity = out if self.velocity is None else self.velocity

        def geometry(*args: Any, **options: Any) -> stages.Geometry:
            options.update(need=stages.GEOMETRY)
            self.seen["geometry"] = original(*args, **options)
            return self.seen["geometry"]

        def appearance(*args: Any) -> Tensor:
            self.seen["rgb"] = original_rgb(*args)
            return self.seen["rgb"]

        original, original_rgb = stages.decode_geometry, stages.decode_appearance
        monkeypatch.setattr(pipeline.transformer, "condition", condition)
        monkeypatch.setattr(stages, "decode_geometry", geometry)
        monkeypatch.setattr(stages, "decode_appearance", appearance)
        pipeline.transformer.register_forward_hook(first_velocity)

    def on_step(self, pipe: Any, step: int, timestep: float, kept: dict[str, Tensor]) -> dict:
        self.latents.append(kept["latents"])
        return kept


def test_cases(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in case_names(golden):
        with monkeypatch.context() as patch:
            pipeline = build_pipeline(golden.sibling("e2e_weights"))
            watch = Watch(pipeline, patch)
            meta, request = golden.meta["cases"][case], request_of(golden, case)
            shared = f"shared_F{meta['num_frames']}"
            scene = pipeline(
                requests=[request],
                num_inference_steps=meta["steps"],
                guidance_scale=meta["guidance_scale"],
                solver=SOLVERS[meta["scheduler"]],
                shift=meta.get("shift", 5.0),
                latents=golden[f"{shared}/noise"],
                posterior_noise=golden[f"{shared}/vae_posterior_noise"],
                callback_on_step_end=watch.on_step,
            )[0]
        check_conditions(golden, case, watch, request)
        check_steps(golden, case, watch)
        check_results(golden, case, watch, scene)


def check_conditions(golden: Golden, case: str, watch: Watch, request: SceneRequest) -> None:
    def check(name: str, actual: Tensor) -> None:
        golden.check(f"{case}/mid/{name}", actual, END_TO_END_TOLERANCE)

    seen = watch.seen
    for index, text in enumerate(seen["text"]):
        check(f"context_{index}", text)
    check("clip_context", seen["image"][:1])
    stored = golden[f"{case}/mid/clip_image_u8"]
    image = to_uint8(request.images[0])
    factor = image.shape[-1] // stored.shape[-1]
    golden.compare(f"{case}/mid/clip_image_u8", image[..., ::factor, ::factor], stored)
    check("control_latents", seen["control"][:1])
    if golden.stored(f"{case}/mid/control_camera_latents"):
        check("control_camera_latents", seen["cameras"][:1])
    else:
        assert not seen["cameras"].any()


def check_steps(golden: Golden, case: str, watch: Watch) -> None:
    assert watch.velocity is not None
    for name, row in (("uncond", watch.velocity[:1]), ("text", watch.velocity[1:])):
        golden.check(f"{case}/mid/noise_pred_{name}_step0", row, END_TO_END_TOLERANCE)
    for index, latents in enumerate(watch.latents):
        golden.check(f"{case}/latents_step{index}", latents, END_TO_END_TOLERANCE)


def check_results(golden: Golden, case: str, watch: Watch, scene: Scene) -> None:
    g: stages.Geometry = watch.seen["geometry"]
    rgb: Tensor = watch.seen["rgb"]

    def check(name: str, actual: Tensor, axes: tuple[int, ...] = (2, 3)) -> None:
        golden.check(f"{case}/{name}", actual, END_TO_END_TOLERANCE, axes=axes)

    assert g.tokens is not None and g.point_map is not None
    check("mid/decoded_tokens", g.tokens.permute(0, 4, 1, 2, 3), axes=(-2, -1))
    check("mid/pose_enc", g.pose_encoding)
    check("out/rgbs", rgb)
    check("out/depth_maps", g.depth[..., None])
    check("out/point_maps", g.point_map)
    check("out/pcds", g.points)
    check("out/point_masks", g.mask)
    check("out/extrinsics", g.extrinsics)
    check("out/intrinsics", g.intrinsics)
    check("out/mask_fraction_per_frame", g.mask.flatten(2).float().mean(2))
    for name, full in (("rgbs_crop", rgb), ("depth_crop", g.depth[..., None])):
        stored = golden[f"{case}/out/{name}"]
        golden.compare(
            f"{case}/out/{name}", _window(full[0], stored[0])[None], stored, END_TO_END_TOLERANCE
        )
    levels = torch.tensor([0, 0.001, 0.02, 0.5, 0.98, 1], dtype=torch.float64)
    flat = g.depth[0].flatten(1)[:, ::7].double()
    check("out/depth_quantiles_per_frame", torch.quantile(flat, levels, dim=1).T)
    # The scene is the same data on the host.
    assert torch.equal(scene.rgb, (rgb[0] * 255).to(torch.uint8))
    assert torch.equal(scene.depth, g.depth[0])
    assert torch.equal(scene.mask, g.mask[0])


def _window(frames: Tensor, crop: Tensor) -> Tensor:
    """The window of `frames` [F, H, W, C] equal to `crop` [h, w, C], whose place is not recorded.

    Positions are sieved by a lattice of the crop's pixels; without a survivor the first window
    stands for the mismatch.
    """
    height, width, _ = crop.shape
    rows, columns = frames.shape[1] - height + 1, frames.shape[2] - width + 1
    possible = torch.ones(len(frames), rows, columns, dtype=torch.bool)
    bound = 10 * END_TO_END_TOLERANCE * crop.abs().max()
    for y in range(0, height, 4):
        for x in range(0, width, 4):
            distance = frames[:, y : y + rows, x : x + columns] - crop[y, x]
            possible &= distance.abs().amax(-1) < bound
    frame, top, left = next(iter(possible.nonzero().tolist()), [0, 0, 0])
    return frames[frame, top : top + height, left : left + width]
