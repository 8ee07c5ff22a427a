"""Many scenes of one engine at once: every stage works on a whole batch, results stay tensors.

`Engine.generate` encodes and decodes scene by scene, which a large model needs and a small one
spends its time on: at 112 x 112 pixels a GPU waits for launches. Here the same functions take
batches. From the same noise (`Sampler.draw`) a scene equals the engine's own up to the rounding of
batched products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r import cameras as camera_maths
from gen3r import stages
from gen3r.cameras import to_homogeneous
from gen3r.conditioning import camera_latents, control_latents, given_frames, task_mask
from gen3r.encoders import tokenize_and_encode
from gen3r.pipeline import check_batch
from gen3r.run import draw_noise, full_float32, join_conditions, text_rows, to_bytes
from gen3r.scene import Cameras, SceneRequest
from gen3r.schedulers import Schedule, make_schedule
from gen3r.transformer import Conditions
from gen3r.vggt import bootstrap
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation.batches import Generated, given_paths, stack_views

TEXTS = 64  # texts that are encoded together
Told = Callable[[int, int], None]  # scenes done, scenes in all
EVERYTHING = frozenset({"rgb", "depth", "cameras"})


@dataclass
class Sampler:
    """Makes scenes in batches with one engine and one way of sampling.

    Parameters
    ----------
    engine : loaded; nothing else may run on it meanwhile.
    batch : scenes at once. steps, guidance, solver : as `Engine.generate`.

    Attributes
    ----------
    seconds : of every stage so far, the GPU's queue included; compiling and capturing under
        ``prepare``.

    Raises
    ------
    ValueError : a batch below 1, an unknown solver, no steps, an engine with plans.
    """

    engine: Engine
    batch: int = 8
    steps: int = 50
    guidance: float | None = None
    solver: str = "euler"
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is below 1; use 1 or more")
        if self.engine.plans is not None:
            raise ValueError(
                "a Sampler runs the model's own modules; load its engine without plans"
            )
        pipeline = self.engine.pipeline
        self._schedule: Schedule = make_schedule(self.solver, self.steps, euler=pipeline.scheduler)
        own = pipeline.config.guidance_scale
        self._guidance = own if self.guidance is None else self.guidance
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[SceneRequest],
        need: frozenset[str] = EVERYTHING,
        told: Told | None = None,
    ) -> Generated:
        """All scenes, in the order of the requests, each from the noise of its seed (`draw`).

        Parameters
        ----------
        requests : of one task, length and size; views are uint8 tensors [H, W, 3] of that size.
        need : of ``rgb``, ``depth``, ``cameras``.
        told : called with (scenes done, scenes in all).

        Raises
        ------
        ValueError : requests that cannot share a batch, views of another size.
        """
        check_batch(requests)
        kinds = {(r.task, type(r.cameras), r.cameras == "free") for r in requests}
        if len(kinds) > 1:
            raise ValueError("requests of one call must agree in task and kind of cameras")
        pieces: list[dict[str, Tensor]] = []
        with full_float32(self.engine.pipeline.dtype == torch.float32):
            self._encode_texts(requests)
            for start in range(0, len(requests), self.batch):
                stop = min(start + self.batch, len(requests))
                rows = list(range(start, stop))
                if self.engine.denoiser.captured and len(requests) > self.batch:
                    # The last batch is filled up: another size would be captured anew.
                    rows += [stop - 1] * (self.batch - len(rows))
                pieces.append(self._batch([requests[i] for i in rows], need))
                pieces[-1] = {name: value[: stop - start] for name, value in pieces[-1].items()}
                if told is not None:
                    told(stop, len(requests))
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        names = ("rgb", "depth", "w2c", "intrinsics")
        return Generated(*(joined.get(name) for name in names))

    def draw(
        self, members: Sequence[SceneRequest]
    ) -> tuple[Tensor, Tensor]:  # [n, 16, f, h, 2 w], [n, 16, f, h, w], float32
        """Initial noise and posterior draws of the requests' seeds, the same for every dtype.

        Drawn in bfloat16 on the engine's device, as the pipeline's own dtype does on a GPU: an
        engine in float32 gets those values too. The generators of a GPU and of the processor
        differ, so the two have other noise.
        """
        device, channels = self.engine.device, self.engine.pipeline.config.transformer.out_dim
        noise, draws = draw_noise(members, None, None, None, channels, device, torch.bfloat16)
        return noise, draws.float()

    def _batch(self, members: list[SceneRequest], need: frozenset[str]) -> dict[str, Tensor]:
        conditions, noise = self._conditions(members)
        denoiser = self.engine.denoiser
        with self._timed("prepare"):  # compiling and capturing of a new shape
            denoiser.prepare(conditions, noise, self._schedule)
        with self._timed("denoise"):
            joint = denoiser.run(conditions, noise, self._schedule, self._guidance)
        if self.engine.choice.residency == "12gb":
            denoiser.release()
        return self._decode(joint, members[0].height, members[0].width, need)

    # ------------------------------------------------------------------------------------- encode

    def _encode_texts(self, requests: Sequence[SceneRequest]) -> None:
        """Features of all texts that are not known yet, many at a time."""
        rows = dict.fromkeys(text_rows(requests, self._guidance > 1))
        missing = [text for text in rows if text not in self._features]
        pipeline, residency = self.engine.pipeline, self.engine.model.residency
        limit = pipeline.config.transformer.text_len
        if not missing:
            return
        with self._timed("encode text"), residency.use("text_encoder") as encoder:
            for start in range(0, len(missing), TEXTS):
                texts = missing[start : start + TEXTS]
                found = tokenize_and_encode(pipeline.tokenizer, encoder, texts, limit)
                self._features |= dict(zip(texts, found, strict=True))

    def _conditions(self, members: list[SceneRequest]) -> tuple[Conditions, Tensor]:
        """Conditions of a batch and its noise [n, 16, f, h, 2 w]."""
        pipeline, residency = self.engine.pipeline, self.engine.model.residency
        device = self.engine.device
        first, tasks = members[0], [r.task or "" for r in members]
        noise, draws = self.draw(members)
        with self._timed("encode views"):
            views = stack_views(members, device)  # [B, V, 3, H, W]
            cameras = self._cameras(members, views)
            frames = given_frames(tasks[0], first.num_frames)
            clips = views.new_zeros(len(views), 3, first.num_frames, first.height, first.width)
            clips[:, :, frames] = views[:, : len(frames)].transpose(1, 2)
            with residency.use("clip_image_encoder") as clip:
                image = stages.embed_views(clip, clips[:, :, 0])
            control = self._control(clips, tasks, draws)
            rows = text_rows(members, self._guidance > 1)
            texts = [self._features[text].to(device) for text in rows]
            conditions = join_conditions(pipeline.transformer, texts, image, control, cameras)
        return conditions, noise

    def _control(
        self,
        clips: Tensor,  # [B, 3, F, H, W] in [0, 1]
        tasks: Sequence[str],
        draws: Tensor,  # [B, 16, f, h, w]
    ) -> Tensor:  # [B, 20, f, h, 2 w]
        """`stages.encode_control` of all clips together."""
        gib = self.engine.choice.working_gib
        with self.engine.model.residency.use("wan_vae") as vae, vae.encoder_products():
            dtype = vae.encoder_dtype
            posterior = vae.encode((clips * 2 - 1).to(dtype), gib)
            appearance = posterior.sample(draws.to(dtype))
        appearance = appearance.to(self.engine.pipeline.dtype)
        rows, columns = stages.latent_grid(*clips.shape[-2:])
        extra = (0, columns - appearance.shape[-1], 0, rows - appearance.shape[-2], 0, 0)
        appearance = F.pad(appearance, extra, mode="replicate")
        mask = task_mask(tasks, clips.shape[2], rows, columns)
        return control_latents(appearance, mask.to(appearance.device))

    def _cameras(
        self,
        members: Sequence[SceneRequest],
        views: Tensor,  # [B, V, 3, H, W] in [0, 1]
    ) -> Tensor:  # [B, 24, f, h, 2 w]
        """`stages.camera_path` and `stages.encode_cameras` of all requests together."""
        first, device, dtype = members[0], self.engine.device, self.engine.pipeline.dtype
        height, width = (
            n * stages.VAE_STRIDE for n in stages.latent_grid(first.height, first.width)
        )
        shape = (len(members), first.num_frames, 6, height, width)
        if first.task == "allview" or first.cameras == "free":
            return camera_latents(torch.zeros(shape, device=device, dtype=dtype))
        if isinstance(first.cameras, Cameras):
            c2w, k = given_paths(members)
        else:
            c2w, k = self._moves(members, views)
        c2w, k = c2w.to(device), k.to(device)
        # float64 until the model's cast, as in `encode_cameras`; frame by frame for the memory.
        plucker = [
            camera_maths.plucker_map(c2w[:, i], k[:, i], height, width).to(dtype)
            for i in range(first.num_frames)
        ]
        return camera_latents(torch.stack(plucker, dim=1))

    def _moves(
        self, members: Sequence[SceneRequest], views: Tensor
    ) -> tuple[Tensor, Tensor]:  # c2w [B, F, 4, 4], intrinsics [B, F, 3, 3], float64
        """Built-in moves, with intrinsics and scale that VGGT finds on the views."""
        frames = members[0].num_frames
        with self.engine.model.residency.use("vggt") as vggt:
            k, scale = bootstrap(vggt, views.to(next(vggt.parameters()).dtype))
        paths = [camera_maths.trajectory(str(r.cameras), frames).double() for r in members]
        c2w = torch.stack(paths)
        c2w[..., :3, 3] *= scale.cpu()[:, None, None]
        return c2w, k.double().cpu()[:, None].expand(-1, frames, -1, -1)

    # ------------------------------------------------------------------------------------- decode

    def _decode(
        self,
        joint: Tensor,  # [n, 16, f, h, 2 w]
        height: int,
        width: int,
        need: frozenset[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        residency, gib = self.engine.model.residency, self.engine.choice.working_gib
        appearance, geometry = stages.split_latents(joint, height, width)
        if "rgb" in need:
            with self._timed("decode appearance"), residency.use("wan_vae") as vae:
                video = vae.decode(appearance.to(self.engine.pipeline.dtype), gib).float()
                pixels = (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
                found["rgb"] = to_bytes(pixels)
        heads = frozenset(need & {"depth", "cameras"})
        if heads:
            modules = residency.use("geo_adapter", "vggt")
            with self._timed("decode geometry"), modules as (adapter, vggt):
                latents = geometry.to(next(adapter.parameters()).dtype)
                tokens = adapter.decode(latents, gib).permute(0, 2, 3, 4, 1)
                g = stages.read_heads(vggt, tokens, height, width, heads)
                if g.depth is not None:
                    found["depth"] = g.depth.cpu()
                if g.extrinsics is not None and g.intrinsics is not None:
                    found["w2c"] = to_homogeneous(g.extrinsics).cpu()
                    found["intrinsics"] = g.intrinsics.cpu()
        return found

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        cuda = self.engine.device.type == "cuda"
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.current_stream(self.engine.device).synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
