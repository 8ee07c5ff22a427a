"""Gen3RPipeline: requests in, scenes out. Orchestrates `gen3r.stages`, in diffusers' manner.

pipe = Gen3RPipeline.from_pretrained("/path/to/gen3r", torch_dtype=torch.bfloat16, device="cuda")
scene = pipe(prompt="a stone arena", images=[Image.open("photo.png")], cameras="zoom_in")
scene.save("outputs/arena")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from gen3r import stages
from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import Gen3RConfig
from gen3r.encoders import tokenize_and_encode
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.run import (
    Progress,
    Run,
    draw_noise,
    full_float32,
    join_conditions,
    prepare_request,
    scene_facts,
    text_rows,
    to_bytes,
    to_scene,
)
from gen3r.scene import Cameras, ImageLike, Scene, SceneRequest
from gen3r.schedulers import make_schedule
from gen3r.transformer import Conditions, WanTransformer
from gen3r.vggt import VGGT
from gen3r_kernels import Backends

STAGES = ("encode text", "encode views", "denoise", "decode appearance", "decode geometry")
MODULES = (
    *("transformer", "wan_vae", "geo_adapter"),
    *("vggt", "text_encoder", "clip_image_encoder"),
)


@dataclass
class Gen3RPipeline:
    """The six components, the tokenizer and the scheduler, on one device.

    `untrained` marks a model whose weights are random, in whole or in part.
    """

    config: Gen3RConfig
    transformer: WanTransformer
    wan_vae: AppearanceVAE
    geo_adapter: GeometryAdapter
    vggt: VGGT
    text_encoder: UMT5EncoderModel
    clip_image_encoder: CLIPVisionModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: FlowMatchEulerDiscreteScheduler
    untrained: bool = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        backends: Backends | None = None,
        allow_pickle: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a published folder (diffusers layout plus ``vggt/``) or hub id.

        Modules are built without memory and filled tensor by tensor in `torch_dtype` on `device`.
        Hub downloads honour HF_HOME and HF_HUB_OFFLINE. `allow_pickle` accepts ``.pth``/``.bin``
        files through ``torch.load(weights_only=True)``.

        Raises
        ------
        CheckpointError : every missing folder and every missing, unexpected or mis-shaped tensor,
            by component, in one message.
        """
        from gen3r.checkpoint import load_pipeline_parts, resolve_checkpoint

        folder = resolve_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        parts = load_pipeline_parts(
            folder, torch_dtype, torch.device(device), backends or Backends(), allow_pickle
        )
        return cls(**parts)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the published folder layout with upstream's parameter names, sharded at 10 GB."""
        from gen3r.checkpoint_save import save_pipeline

        save_pipeline(self, Path(save_directory))

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every component, as ``torch.nn.Module.to``."""
        for name in MODULES:
            getattr(self, name).to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "",
        images: Sequence[ImageLike] | ImageLike | None = None,
        task: str | None = None,
        cameras: str | Cameras = "free",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str = "bad detailed",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,  # [B, 16, f, h, 2 w] initial noise
        callback_on_step_end: Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
        output_type: str = "scene",
        *,
        seed: int = 42,
        requests: Sequence[SceneRequest] | None = None,
        solver: str = "euler",
        shift: float = 5.0,
        point_maps: bool = False,
        posterior_noise: Tensor | None = None,  # [B, 16, f, h, w]
        progress: Progress | None = None,
    ) -> Scene | list[Scene] | Tensor:
        """Generate one scene, or with `requests` a list of them as one batch.

        Without `generator` every request draws from its own generator, seeded with its seed on the
        pipeline's device, so a scene does not depend on what it is batched with.
        `num_frames`, sides and `guidance_scale` are the model's own where None is given.
        `callback_on_step_end` is called as ``f(pipe, step, timestep, {"latents": x})`` and may
        return replaced latents.
        `output_type` is ``scene``, or ``latent`` for the joint latents [B, 16, f, h, 2 w].

        Raises
        ------
        ValueError : fields outside their limits, or requests that cannot share a batch.
        """
        if output_type not in ("scene", "latent"):
            raise ValueError(f"output_type '{output_type}' is unknown; known: scene, latent")
        single = requests is None
        if requests is None:
            if images is None:
                raise ValueError("no images given: pass images=[...] or requests=[...]")
            requests = [
                SceneRequest(
                    images=images if isinstance(images, Sequence) else [images],
                    prompt=prompt,
                    task=task,
                    cameras=cameras,
                    num_frames=self.config.num_frames if num_frames is None else num_frames,
                    height=self.config.size if height is None else height,
                    width=self.config.size if width is None else width,
                    negative_prompt=negative_prompt,
                    seed=seed,
                )
            ]
        check_batch(requests)
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        schedule = make_schedule(solver, num_inference_steps, shift=shift, euler=self.scheduler)
        run = Run(self.device, progress)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        channels = self.config.transformer.out_dim
        noise, draws = draw_noise(
            requests, generator, latents, posterior_noise, channels, self.device, self.dtype
        )

        def on_step(index: int, timestep: float, x: Tensor) -> Tensor | None:
            tick(index + 1)
            if callback_on_step_end is None:
                return None
            return callback_on_step_end(self, index, timestep, {"latents": x}).get("latents")

        with full_float32(self.dtype == torch.float32):
            texts = self._encode_text(run, requests, guidance_scale > 1)
            conditions = self._condition(run, requests, texts, draws)
            with run.stage("denoise", num_inference_steps) as tick:
                joint = stages.denoise(
                    self.transformer, conditions, noise, schedule, guidance_scale, on_step
                )
            if output_type == "latent":
                return joint
            scenes = self._decode(run, requests, joint, point_maps)
        for scene in scenes:
            scene.info.update(
                steps=num_inference_steps,
                guidance_scale=guidance_scale,
                solver=solver,
                batch=len(requests),
            )
        return scenes[0] if single else scenes

    def _encode_text(
        self, run: Run, requests: Sequence[SceneRequest], guided: bool
    ) -> list[Tensor]:
        """Text features per row, the negative rows first; equal prompts are encoded once."""
        rows = text_rows(requests, guided)
        unique = list(dict.fromkeys(rows))
        with run.stage("encode text", len(unique)):
            encoded = tokenize_and_encode(
                self.tokenizer, self.text_encoder, unique, self.config.transformer.text_len
            )
        return [encoded[unique.index(row)] for row in rows]

    def _condition(
        self, run: Run, requests: Sequence[SceneRequest], texts: list[Tensor], draws: Tensor
    ) -> Conditions:
        """Encode views and cameras and project them for the transformer."""
        videos, packed = [], []
        with run.stage("encode views", len(requests)) as tick:
            for index, request in enumerate(requests):
                video, cameras = prepare_request(request, self.vggt, self.device, self.dtype)
                videos.append(video)
                packed.append(cameras)
                tick(index + 1)
            clips = torch.stack(videos)
            image = stages.embed_views(self.clip_image_encoder, clips[:, :, 0])
            tasks = [r.task or "" for r in requests]
            control = stages.encode_control(self.wan_vae, clips, tasks, draws)
            return join_conditions(self.transformer, texts, image, control, torch.cat(packed))

    def _decode(
        self, run: Run, requests: Sequence[SceneRequest], joint: Tensor, point_maps: bool
    ) -> list[Scene]:
        """Joint latents to scenes on the host."""
        height, width = requests[0].height, requests[0].width
        appearance, geometry = stages.split_latents(joint, height, width)
        scenes = []
        for index, request in enumerate(requests):
            row = slice(index, index + 1)
            with run.stage("decode appearance", 1):
                rgb = stages.decode_appearance(self.wan_vae, appearance[row])
                pixels = to_bytes(rgb[0]).cpu()
            with run.stage("decode geometry", 1):
                g = stages.decode_geometry(
                    self.geo_adapter,
                    self.vggt,
                    geometry[row],
                    height,
                    width,
                    need=stages.scene_geometry(point_maps),
                )
                scenes.append(to_scene(pixels, g))
            scenes[-1].info.update(scene_facts(request, self.dtype, self.device, run))
        return scenes


def check_batch(requests: Sequence[SceneRequest]) -> None:
    """Raise ValueError unless the requests are one size and length."""
    if not requests:
        raise ValueError("no requests given")
    sizes = {(r.num_frames, r.height, r.width) for r in requests}
    if len(sizes) > 1:
        listed = ", ".join(f"{f} x {h} x {w}" for f, h, w in sorted(sizes))
        raise ValueError(
            f"requests of one batch must agree in frames x height x width, got {listed}; "
            "run them in separate calls"
        )
