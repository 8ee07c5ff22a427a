"""Does a preset give the scene that the plain pipeline gives? One request, both, the same noise.

The plain pipeline is `Gen3RPipeline` with separate PyTorch operators. Compared are the latents
after every step, the video, depth and cameras; `limits_for` says what is accepted and why.

That says whether the computation is right. How good the scenes are, and what the preset takes from
them, `evaluation.preset_quality` measures on scenes whose truth is known.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gen3r.cameras import invert_pose
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r.run import draw_noise, full_float32
from gen3r.scene import Scene, SceneRequest
from gen3r.schedulers import make_schedule
from gen3r_engine.config import EngineConfig
from gen3r_engine.engine import Engine
from gen3r_engine.fidelity import Curve, Recorder, curve
from gen3r_engine.memory import OutOfMemory
from gen3r_engine.scene_batches import Batch, Sampling
from gen3r_kernels import Backends

PLAIN = Backends(operators="reference", attention="sdpa")
# Of the median depth: below it the direction of a camera's way is noise.
LEAST_MOTION = 0.01


@dataclass(frozen=True)
class Limits:
    """What is accepted, and the reason.

    Parameters
    ----------
    latents : relative error of the final latents.
    psnr : of the 8-bit video, dB (at least).
    depth : mean of |depth - reference| / reference where the reference's mask holds.
    rotation, translation : degrees, the worst frame; of the translation its direction.
    """

    latents: float
    psnr: float
    depth: float
    rotation: float
    translation: float
    reason: str


LIMITS: dict[str, Limits] = {
    "float32": Limits(
        *(1e-3, 50.0, 1e-3, 0.05, 0.5),
        "both in float32: only the order of sums differs, and 50 steps enlarge it; truncation to "
        "8 bits turns it into single levels of a few pixels",
    ),
    "exact": Limits(
        *(0.05, 30.0, 0.03, 1.0, 5.0),
        "bfloat16: two correct runs that round at different places end about 1 % apart in the "
        "latents with seeded random weights; five times that leaves room for weights and scenes "
        "that enlarge rounding more, and is below what is seen in a video",
    ),
    "fp8": Limits(
        *(0.25, 20.0, 0.15, 5.0, 20.0),
        "8-bit products round 1 to 4 % a layer, independently: a scene of the same content, whose "
        "details may differ",
    ),
}


def limits_for(preset: str, dtype: str, reference_dtype: str) -> Limits:
    """The limits of a preset; those of float32 where nothing is rounded to less."""
    if preset == "exact" and dtype == reference_dtype == "float32":
        return LIMITS["float32"]
    return LIMITS[preset]


@dataclass(frozen=True)
class Verification:
    """What was measured; `failures` is empty when everything is within `limits`.

    psnr : infinite for equal videos. depth : mean relative error. rotation, translation : degrees,
    the worst frame; translation None where the reference's camera does not move.
    """

    preset: str
    dtype: str
    reference_dtype: str
    steps: int
    curve: Curve
    psnr: float
    depth: float
    rotation: float
    translation: float | None
    limits: Limits

    @property
    def failures(self) -> list[str]:
        """One text for every figure beyond its limit; NaN is beyond all."""
        limits, found = self.limits, []
        for name, value, limit, unit in (
            ("latent error", self.curve.last, limits.latents, ""),
            ("depth error", self.depth, limits.depth, ""),
            ("rotation", self.rotation, limits.rotation, " degrees"),
            ("translation", self.translation, limits.translation, " degrees"),
        ):
            if value is not None and not value <= limit:
                found.append(f"{name} {value:.4g}{unit} is above {limit:.4g}")
        if not self.psnr >= limits.psnr:
            found.append(f"PSNR {self.psnr:.4g} dB is below {limits.psnr:.4g}")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite PSNR becomes null."""
        values = asdict(self) | {"passed": self.passed, "failures": self.failures}
        if math.isinf(self.psnr):
            values["psnr"] = None
        return values


@dataclass(frozen=True)
class _Run:
    scene: Scene
    latents: list[Tensor]
    dtype: str


def verify(
    checkpoint: str | None,
    config: EngineConfig,
    request: SceneRequest,
    *,
    steps: int = 50,
    guidance: float | None = None,
    reference_dtype: str | None = None,
    tell_plans: Callable[[str], None] | None = None,
) -> Verification:
    """Make the request's scene in the config's preset and with the plain pipeline, and compare.

    One after the other, so that only one model is in memory. checkpoint None: the embedded model.
    guidance None: the model's own. reference_dtype None: the preset's own dtype.
    tell_plans : called with a line about each exported plan, and about parts that run without.

    Raises
    ------
    CheckpointError, ValueError : as `Engine.load`.
    OutOfMemory : the plain pipeline keeps everything on the GPU and does not fit.
    """
    # One stage after the other on one stream; nothing of the first run is taken for the second.
    config = replace(config, overlap=False, max_batch=1)
    engine = Engine.load(checkpoint, config)
    if engine.plans is not None and tell_plans is not None:
        for line in engine.plans.report:
            tell_plans(f"plan {line}")
        engine.plans.tell = tell_plans
    device, dtype = engine.device, engine.choice.dtype
    channels = engine.pipeline.config.transformer.out_dim
    guidance = engine.pipeline.config.guidance_scale if guidance is None else guidance
    noise, draws = draw_noise([request], None, None, None, channels, device, torch.bfloat16)
    draws = draws.float()
    found = _engine_run(engine, request, steps, guidance, noise, draws)
    engine.close()
    del engine
    _release(device)
    plain = reference_dtype or dtype
    expected = _plain_run(checkpoint, plain, device, request, steps, guidance, noise, draws, config)
    _release(device)
    rotation, translation = pose_angles(found.scene, expected.scene)
    return Verification(
        preset=config.preset,
        dtype=dtype,
        reference_dtype=plain,
        steps=steps,
        curve=curve(found.latents, expected.latents),
        psnr=psnr(found.scene.rgb, expected.scene.rgb),
        depth=depth_error(found.scene, expected.scene),
        rotation=rotation,
        translation=translation,
        limits=limits_for(config.preset, dtype, plain),
    )


def _engine_run(
    engine: Engine, request: SceneRequest, steps: int, guidance: float, noise: Tensor, draws: Tensor
) -> _Run:
    """Stage by stage, because the latents of every step are wanted."""
    recorder, stages = Recorder(), engine.stages
    schedule = make_schedule("euler", steps, euler=engine.pipeline.scheduler)
    batch = Batch((0,), (request,), engine.device)
    sampling = Sampling(schedule, guidance, latents=noise, posterior_noise=draws)
    with full_float32(engine.pipeline.dtype == torch.float32):
        encoded = stages.encode(batch, sampling)
        with stages.watch("denoise", (0,), request):
            loop = stages.loop(stages.planned(batch, sampling.guided).denoiser)
            joint = loop(encoded.conditions, encoded.noise, schedule, guidance, recorder)
        if engine.choice.residency == "12gb":
            engine.denoiser.release()
        scene = stages.finish(stages.decode(batch, 0, joint, sampling))
    return _Run(scene, recorder.latents, engine.choice.dtype)


def _plain_run(
    checkpoint: str | None,
    dtype: str,
    device: torch.device,
    request: SceneRequest,
    steps: int,
    guidance: float,
    noise: Tensor,
    draws: Tensor,
    config: EngineConfig,
) -> _Run:
    kind, recorder = getattr(torch, dtype), Recorder()

    def on_step(
        _: Any, index: int, timestep: float, values: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        recorder(index, timestep, values["latents"])
        return {}

    try:
        if checkpoint is None:
            pipeline = build_nano(kind, device, PLAIN)
        else:
            pipeline = Gen3RPipeline.from_pretrained(
                checkpoint,
                torch_dtype=kind,
                device=device,
                backends=PLAIN,
                allow_pickle=config.allow_pickle,
            )
        scenes = pipeline(
            requests=[request],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise,
            posterior_noise=draws,
            callback_on_step_end=on_step,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory(
            "the plain pipeline",
            None,
            "it keeps all weights on the GPU (about 23 GiB in bfloat16 at 49 x 560 x 560); "
            "use fewer frames or a smaller size",
        ) from error
    assert isinstance(scenes, list)
    return _Run(scenes[0], recorder.latents, dtype)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def psnr(
    found: Tensor,  # [F, H, W, 3] uint8
    reference: Tensor,  # the same
) -> float:
    """dB of an 8-bit video; infinite for equal ones."""
    error = float((found.double() - reference.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def depth_error(found: Scene, reference: Scene) -> float:
    """Mean of |depth - reference| / |reference| where the reference's mask holds (AbsRel)."""
    kept = reference.mask & (reference.depth != 0)
    if not kept.any():
        return 0.0 if torch.equal(found.depth, reference.depth) else math.inf
    wanted = reference.depth[kept].double()
    return float(((found.depth[kept].double() - wanted).abs() / wanted.abs()).mean())


def pose_angles(found: Scene, reference: Scene) -> tuple[float, float | None]:
    """Degrees of the worst frame: between rotations, and between directions from the first camera.

    The direction is None where no camera of the reference leaves its first place by more than
    `LEAST_MOTION` of the median depth.
    """
    ours, theirs = (_from_first(scene.extrinsics) for scene in (found, reference))
    # |A - B| of two rotations is 2 sqrt(2) sin(angle / 2): exact near 0, where arccos is not.
    distance = (ours[:, :3, :3] - theirs[:, :3, :3]).flatten(1).norm(dim=1)
    angles = 2 * torch.asin((distance / math.sqrt(8)).clamp(max=1))
    rotation = math.degrees(float(angles.max()))
    here, there = ours[:, :3, 3], theirs[:, :3, 3]
    scale = float(reference.depth.abs().median())
    moved = there.norm(dim=1) > LEAST_MOTION * scale
    if not moved.any():
        return rotation, None
    unit = [torch.nn.functional.normalize(x[moved], dim=1) for x in (here, there)]
    apart = 2 * torch.asin(((unit[0] - unit[1]).norm(dim=1) / 2).clamp(max=1))
    return rotation, math.degrees(float(apart.max()))


def _from_first(
    extrinsics: Tensor,  # [F, 4, 4] world to camera
) -> Tensor:  # [F, 4, 4] float64 camera to first camera
    world = extrinsics.double()
    return world[:1] @ invert_pose(world)
