"""The stages of a batch of scenes on one engine: encode, denoise, decode, fuse, finish.

Every stage calls gen3r's functions. Added here: text features from the cache, modules brought to
the GPU and away as the memory tier says, the captured denoising loop, streams, asynchronous copies.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gen3r import stages
from gen3r.encoders import tokenize_and_encode
from gen3r.pipeline import Gen3RPipeline
from gen3r.run import (
    Run,
    draw_noise,
    join_conditions,
    join_inputs,
    prepare_request,
    scene_facts,
    scene_tensors,
    text_rows,
    to_bytes,
)
from gen3r.scene import Scene, SceneRequest
from gen3r.schedulers import Schedule
from gen3r.transformer import Conditions, RawConditions
from gen3r_engine.denoiser import Denoiser
from gen3r_engine.fusion import FusionConfig, fuse
from gen3r_engine.fusion_device import cloud_tensors, fuse_tensors, take_cloud
from gen3r_engine.memory import guard, working_gib
from gen3r_engine.packing import pack_frames
from gen3r_engine.planned import PlannedAutoencoder, PlannedHeads, PlannedSteps
from gen3r_engine.plans import Chosen, EnginePlans
from gen3r_engine.presets import PresetChoice
from gen3r_engine.prompts import PromptCache
from gen3r_engine.residency import Residency
from gen3r_engine.scene_batches import Batch, Decoded, Encoded, Sampling, failing
from gen3r_engine.streams import Streams

if TYPE_CHECKING:
    from gen3r_engine.fusion_cuda import FusedTensors

Stop = Callable[[], bool]
NO_PLANS = Chosen()


class SceneStages:
    """The stages, on one model. `streams` says what runs apart; `failing` names errors.

    plans : exported plans that run in the place of modules, None without.
    """

    def __init__(
        self,
        pipeline: Gen3RPipeline,
        residency: Residency,
        prompts: PromptCache,
        denoiser: Denoiser,
        device: torch.device,
        choice: PresetChoice,
        plans: EnginePlans | None = None,
    ) -> None:
        self.choice, self.plans = choice, plans
        # For the text of an error.
        self.weights_gib = residency.weights_gib() + (0.0 if plans is None else plans.gib)
        self.pipeline, self.residency, self.prompts = pipeline, residency, prompts
        self.denoiser, self.device = denoiser, device
        self.streams = Streams(device, apart=False)
        # Held by what talks to the GPU beside the loop, and by a loop that compiles and captures:
        # compiling is not made for company, and nothing of others may end up in a capture.
        self._quiet = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.dtype

    def planned(self, batch: Batch, guided: bool) -> Chosen:
        """The plans that a batch's parts run from."""
        if self.plans is None:
            return NO_PLANS
        return self.plans.choose(*_shape(batch), guided)

    def announce(self, batch: Batch, guided: bool) -> None:
        """Tell which parts of a batch run without their plans, once a shape."""
        if self.plans is not None:
            self.plans.announce(*_shape(batch), guided)

    # ------------------------------------------------------------------------------------- encode

    @torch.no_grad()
    def encode(self, batch: Batch, sampling: Sampling) -> Encoded:
        """Text, views, cameras and noise of a batch."""
        self.announce(batch, sampling.guided)  # half of a batch that was too large is another shape
        with self._beside("encode text", batch.indices, batch.requests[0]):
            texts = self._texts(batch, sampling.guided)
        return self.views(batch, sampling, texts)

    def _texts(self, batch: Batch, guided: bool) -> list[Tensor]:
        """Text features per row. Each text is encoded alone, so that its features depend on no
        other."""
        rows = text_rows(batch.requests, guided)
        found = {text: self.prompts.get(text) for text in dict.fromkeys(rows)}
        missing = [text for text, features in found.items() if features is None]
        with batch.run.stage("encode text", len(found)) as tick:
            if missing:
                limit = self.pipeline.config.transformer.text_len
                planned = self.planned(batch, guided).text_encoder
                use = self.residency.use("text_encoder") if planned is None else None
                with use or nullcontext(planned) as encoder:
                    for done, text in enumerate(missing, start=len(found) - len(missing)):
                        tick(done)
                        (features,) = tokenize_and_encode(
                            self.pipeline.tokenizer, encoder, [text], limit
                        )
                        self.prompts.put(text, features)
                        found[text] = features
        features_of = {t: f.to(self.device) for t, f in found.items() if f is not None}
        return [features_of[text] for text in rows]

    @torch.no_grad()
    def views(
        self,
        batch: Batch,
        sampling: Sampling,
        texts: list[Tensor],  # [n_i, text_dim] per row
    ) -> Encoded:
        """Views, cameras and noise of a batch whose text is encoded."""
        with self._beside("encode views", batch.indices, batch.requests[0]):
            return self._views(batch, sampling, texts)

    def _views(self, batch: Batch, sampling: Sampling, texts: list[Tensor]) -> Encoded:
        requests, planned = batch.requests, self.planned(batch, sampling.guided)
        noise, draws = draw_noise(
            requests,
            None,
            _rows(sampling.latents, batch.indices),
            _rows(sampling.posterior_noise, batch.indices),
            self.pipeline.config.transformer.out_dim,
            self.device,
            self.dtype,
        )
        videos, packed = [], []
        with batch.run.stage("encode views", len(requests)) as tick:
            for index, request in enumerate(requests):
                tick(index)
                with self._vggt_for(request) as vggt:
                    video, cameras = prepare_request(request, vggt, self.device, self.dtype)
                videos.append(video)
                packed.append(cameras)
            clips = torch.stack(videos)
            if planned.image_encoder is not None:
                image = planned.image_encoder.embed(clips[:, :, 0])
            else:
                with self.residency.use("clip_image_encoder") as clip:
                    image = stages.embed_views(clip, clips[:, :, 0])
            with self._vae_encoder(planned) as vae:
                tasks = [r.task or "" for r in requests]
                gib = self.choice.working_gib
                control = stages.encode_control(vae, clips, tasks, draws, gib)
            given = (texts, image, control, torch.cat(packed))
            conditions: Conditions | RawConditions
            if planned.denoiser is None:
                conditions = join_conditions(self.pipeline.transformer, *given)
            else:
                conditions = join_inputs(*given)
        return Encoded(conditions, noise)

    @contextmanager
    def _vae_encoder(self, planned: Chosen) -> Iterator[Any]:
        if planned.vae_encoder is not None:
            yield PlannedAutoencoder(self.pipeline.wan_vae, encode=planned.vae_encoder)
            return
        with self.residency.use("wan_vae") as vae:
            yield vae

    @contextmanager
    def _vggt_for(self, request: SceneRequest) -> Iterator[Any]:
        if not stages.needs_vggt(request):
            yield self.pipeline.vggt
            return
        with self.residency.use("vggt") as vggt:
            yield vggt

    # ------------------------------------------------------------------------------------ denoise

    def denoise(
        self, batch: Batch, encoded: Encoded, sampling: Sampling, cancelled: Stop
    ) -> Tensor:  # [n, 16, f, h, 2 w] float32
        """The denoising loop of a batch. Raises `Cancelled` when `cancelled` says so."""
        schedule, progress = sampling.schedule, batch.run.progress
        steps = self.planned(batch, sampling.guided).denoiser
        with self.watch("denoise", batch.indices, batch.requests[0]), self.streams.denoising():
            if steps is None:
                self._compile(batch, encoded, schedule)
            with batch.run.stage("denoise", len(schedule)) as tick:

                def on_step(index: int, timestep: float, latents: Tensor) -> None:
                    tick(index + 1)

                joint = self.loop(steps)(
                    encoded.conditions,
                    encoded.noise,
                    schedule,
                    sampling.guidance,
                    None if progress is None else on_step,
                    cancelled,
                )
                # The conditions go when this returns: nothing may still read them.
                self.streams.wait()
        return joint

    def loop(self, steps: PlannedSteps | None) -> Callable[..., Tensor]:
        """The denoising loop on the transformer or on plans of it; arguments as `Denoiser.run`."""
        run = self.denoiser.run
        return run if steps is None else partial(self.denoiser.run_planned, steps)

    def _compile(self, batch: Batch, encoded: Encoded, schedule: Schedule) -> None:
        """Compile and capture where the loop does not know the shape, while nothing else runs."""
        conditions = cast(Conditions, encoded.conditions)
        new = not self.denoiser.knows(conditions, encoded.noise, schedule)
        if new and (self.denoiser.compiled or self.denoiser.captured):
            with self._quiet, batch.run.stage("compile", 1):
                self.denoiser.prepare(conditions, encoded.noise, schedule)

    # ------------------------------------------------------------------------------------- decode

    @torch.no_grad()
    def decode(self, batch: Batch, row: int, joint: Tensor, sampling: Sampling) -> Decoded:
        """Scene `row` of a batch from the joint latents, on its way to the host."""
        request, indices = batch.requests[row], (batch.indices[row],)
        height, width = request.height, request.width
        run, planned = batch.run_of(row), self.planned(batch, sampling.guided)
        appearance, geometry = stages.split_latents(joint[row : row + 1], height, width)
        with (
            self._beside("decode appearance", indices, request),
            run.stage("decode appearance", 1),
            self._vae_decoder(planned) as vae,
        ):
            gib = self.choice.working_gib
            pixels = _as_bytes(stages.decode_appearance(vae, appearance, gib)[0])
        with (
            self._beside("decode geometry", indices, request),
            run.stage("decode geometry", 1),
            self._geometry_decoders(planned, sampling.point_maps) as (adapter, vggt),
        ):
            need = stages.scene_geometry(sampling.point_maps)
            g = stages.decode_geometry(
                adapter, vggt, geometry, height, width, need=need, working_gib=gib
            )
            # Here, on the stream beside the loop: what is launched outside these blocks would run
            # on the default stream, unordered with it and into a capture under way.
            tensors = scene_tensors(pixels, g)
        fused = self._fuse(tensors, sampling.fusion, indices, request, run)
        with self._beside("copy to the host", indices, request):
            copy = self.streams.to_host(tensors | cloud_tensors(fused))
        facts = None if self.plans is None else planned.facts()
        return Decoded(batch, row, copy, run, sampling.fusion, fused, facts)

    @contextmanager
    def _vae_decoder(self, planned: Chosen) -> Iterator[Any]:
        if planned.vae_decoder is not None:
            yield PlannedAutoencoder(self.pipeline.wan_vae, decode=planned.vae_decoder)
            return
        with self.residency.use("wan_vae") as vae:
            yield vae

    @contextmanager
    def _geometry_decoders(self, planned: Chosen, point_maps: bool) -> Iterator[tuple[Any, Any]]:
        """Adapter and VGGT; a module comes to the GPU only for what no plan does."""
        heads = {"camera": planned.camera_head, "depth": planned.depth_head}
        heads |= {"point": planned.point_head} if point_maps else {}
        with ExitStack() as stack:
            adapter: Any
            if planned.adapter_decoder is not None:
                decode = planned.adapter_decoder
                adapter = PlannedAutoencoder(self.pipeline.geo_adapter, decode=decode)
            else:
                adapter = stack.enter_context(self.residency.use("geo_adapter"))
            vggt: Any = self.pipeline.vggt
            if any(plan is None for plan in heads.values()):
                vggt = stack.enter_context(self.residency.use("vggt"))
            if any(plan is not None for plan in heads.values()):
                vggt = PlannedHeads(vggt, **heads)
            yield adapter, vggt

    def _fuse(
        self,
        tensors: dict[str, Tensor | None],
        config: FusionConfig | None,
        indices: tuple[int, ...],
        request: SceneRequest,
        run: Run,
    ) -> FusedTensors | None:
        """The cloud on the GPU; None where it is not asked for or another backend makes it."""
        if config is None or not self._on_gpu(config):
            return None
        # Too wide for the voxels (a field of view near 180 degrees does that): the scene is not
        # lost for it, its cloud is left to whoever writes it, who says so.
        too_wide = suppress(ValueError)
        with self._beside("fuse", indices, request), run.stage("fuse", 1), too_wide:
            return fuse_tensors(Scene(**cast(dict[str, Any], tensors)), config)
        return None

    def _on_gpu(self, config: FusionConfig) -> bool:
        return self.device.type == "cuda" and config.backend in ("auto", "cuda")

    def finish(self, decoded: Decoded) -> Scene:
        """The scene on the host; for a worker thread, which may wait here."""
        batch, row = decoded.batch, decoded.row
        with failing((batch.indices[row],), "copy to the host"):
            with self._quiet:
                decoded.copy.wait()
            arrays: dict[str, Any] = decoded.copy.result()
        cloud = take_cloud(arrays, decoded.fused)
        scene = Scene(**arrays, cloud=cloud)
        config = decoded.fusion
        if config is not None and not self._on_gpu(config):
            with (
                failing((batch.indices[row],), "fuse"),
                decoded.run.stage("fuse", 1),
                suppress(ValueError),  # as in `_fuse`
            ):
                scene = dataclasses.replace(scene, cloud=fuse(scene, config))
        scene.info.update(
            scene_facts(batch.requests[row], self.dtype, self.device, decoded.run),
            seconds={**batch.run.seconds, **decoded.run.seconds},
            index=batch.indices[row],
            batch=len(batch.indices),
        )
        if decoded.plans is not None:
            scene.info["plans"] = decoded.plans
        return scene

    @contextmanager
    def watch(self, stage: str, indices: tuple[int, ...], request: SceneRequest) -> Iterator[None]:
        """Errors name stage and scene; out of memory names the need and what fits."""
        shape = request.num_frames, request.height, request.width
        needed = working_gib(stage, *shape, len(indices), self.choice.dtype) + self.weights_gib
        budget, tier = self.choice.budget_gib, self.choice.residency
        with (
            failing(indices, stage),  # outside: `guard` makes the error it notes the request on
            guard(stage, needed, tier, batch=len(indices), budget_gib=budget),
        ):
            yield

    @contextmanager
    def _beside(
        self, stage: str, indices: tuple[int, ...], request: SceneRequest
    ) -> Iterator[None]:
        with self.watch(stage, indices, request), self._quiet, self.streams.beside():
            yield
            self.streams.wait()


def _shape(batch: Batch) -> tuple[int, int, int, int]:
    request = batch.requests[0]
    return request.num_frames, request.height, request.width, len(batch.requests)


def _as_bytes(
    rgb: Tensor,  # [F, H, W, 3] in [0, 1]
) -> Tensor:  # the same, uint8
    return to_bytes(rgb) if rgb.is_cuda else torch.from_numpy(pack_frames(rgb))


def _rows(tensor: Tensor | None, indices: Sequence[int]) -> Tensor | None:
    return None if tensor is None else tensor[list(indices)]
