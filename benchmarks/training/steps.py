"""Training steps at any size with seeded random weights: upstream's way, and ours.

`eager`: separate PyTorch operators and PyTorch's attention, every block recomputed as a whole,
autoencoders one latent frame at a time, PyTorch's fused AdamW on float32 masters. `exact`: this
project's operators, attention kept while the rest of a block is recomputed, its own AdamW. Weights,
inputs, noise and timesteps are the same, and so is what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode import upstream
from benchmarks.decode.cases import Setting
from benchmarks.engine.inputs import IMAGE_TOKENS, PROMPT_TOKENS, zoom
from benchmarks.training.upstream import upstream_blocks
from benchmarks.weights import build_transformer
from gen3r import stages
from gen3r.cameras import invert_pose
from gen3r.conditioning import control_latents, task_mask
from gen3r.schedulers import make_euler_scheduler
from gen3r.transformer import RawConditions
from gen3r_training import flops
from gen3r_training.activations import checkpoint_blocks
from gen3r_training.adapter import adapter_loss, vggt_token_maps
from gen3r_training.diffusion import diffusion_step, encode_camera_batch, flow_sample
from gen3r_training.optimizer import Optimizer, gradient_norm

SEED = 17
TIMESTEP = 600  # of the scheduler's table of 1000
LEARNING_RATE = 1e-5
CLIP_NORM = 0.5


class EagerAdamW:
    """bf16 parameters, float32 masters, PyTorch's fused AdamW: what most training code does."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        fused = self.masters[0].is_cuda
        self.inner = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=fused)

    def step(self, lr: float, max_norm: float) -> float:
        """As `gen3r_training.optimizer.Optimizer.step`."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = torch.zeros_like(master)
            if parameter.grad is not None:
                master.grad.copy_(parameter.grad)
            parameter.grad = None
        gradients = [m.grad for m in self.masters if m.grad is not None]
        norm = gradient_norm(gradients)
        torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
        self.inner.step()
        self.inner.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), list[Tensor](self.masters))
        return norm


@dataclass(frozen=True)
class StepProblem:
    """run: one step, its loss and gradient norm; flops: of the mathematics, see `flops`."""

    run: Callable[[], tuple[float, float]]
    flops: float


@dataclass(frozen=True)
class StepOptions:
    """Of ours: activation checkpointing and the blocks whose linear layers are kept, master
    weights, and whether blocks go through torch.compile.
    """

    checkpointing: str = "selective"
    kept_blocks: int = 0
    master_weights: str = "float32"
    compiled: bool = False


def _optimizer(setting: Setting, module: nn.Module, options: StepOptions) -> Any:
    if setting.options.dtype == torch.float32:
        return Optimizer(module, lr=LEARNING_RATE)
    if setting.upstream:
        return EagerAdamW(module)
    return Optimizer(module, lr=LEARNING_RATE, master=options.master_weights, seed=SEED)


def _norms(setting: Setting) -> AbstractContextManager[None]:
    return upstream.upstream_norms() if setting.upstream else nullcontext()


def _blocks(setting: Setting) -> AbstractContextManager[None]:
    return upstream_blocks() if setting.upstream else nullcontext()


def _frames(setting: Setting) -> Tensor:  # [1, F, 3, H, W] in [0, 1], smooth as photos are
    o = setting.options
    generator = torch.Generator(setting.device).manual_seed(SEED)
    coarse = torch.rand(
        o.frames, 3, o.size // 28, o.size // 28, device=setting.device, generator=generator
    )
    return torch.nn.functional.interpolate(coarse, (o.size, o.size), mode="bicubic").clamp(0, 1)[
        None
    ]


class Encoders:
    """The frozen modules of a step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.vggt, self.vae = setting.vggt(), setting.vae()

    def tokens(self, frames: Tensor) -> Tensor:
        """VGGT's token maps."""
        return vggt_token_maps(self.vggt, frames.to(self.setting.options.dtype))

    @torch.no_grad()
    def appearance(self, frames: Tensor) -> Any:
        """The posterior of the appearance VAE."""
        video = (2 * frames - 1).transpose(1, 2).to(self.setting.options.dtype)
        return self.vae.encode(video, self.setting.working_gib)


def diffusion_problem(setting: Setting, options: StepOptions, *, encode: bool) -> StepProblem:
    """Stage 2: forward, backward and update of the transformer; with `encode` also what the frozen
    modules make of the frames (target, and the control video's appearance), else from latents.
    """
    o, config = setting.options, setting.options.model.transformer
    transformer = build_transformer(config, o.dtype, setting.device, setting.backends)
    transformer.requires_grad_(True)
    if setting.upstream:
        checkpoint_blocks(transformer, "full")
    else:
        checkpoint_blocks(transformer, options.checkpointing, options.kept_blocks)
    if options.compiled and not setting.upstream:
        for block in transformer.typed_blocks:
            block.alone = torch.compile(block.alone)  # type: ignore[method-assign]
    optimizer = _optimizer(setting, transformer, options)
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(setting.device)

    rows, columns = stages.latent_grid(o.size, o.size)
    _, count, _, width = stages.latent_shape(o.frames, o.size, o.size)
    text = draw(min(PROMPT_TOKENS, config.text_len), config.text_dim).to(o.dtype)
    image = draw(1, IMAGE_TOKENS, config.clip_dim).to(o.dtype)
    noise = draw(1, config.out_dim, count, rows, width).float()
    half = draw(1, config.out_dim, count, rows, columns).float()
    given = draw(1, config.out_dim, count, rows, columns)
    draws = [draw(1, config.out_dim, count, rows, columns).float() for _ in range(3)]
    scheduler = make_euler_scheduler()
    cameras = zoom(o.frames, o.size)
    c2w = invert_pose(cameras.extrinsics)[None].float().to(setting.device)
    intrinsics = cameras.intrinsics[None].float().to(setting.device)
    mask = task_mask(["1view"], o.frames, rows, columns).to(setting.device)
    encoders = Encoders(setting) if encode else None
    adapter = setting.adapter() if encode else None
    frames = _frames(setting) if encode else None
    indices = torch.tensor([TIMESTEP])

    @torch.no_grad()
    def latents() -> tuple[Tensor, Tensor]:
        """Clean joint latents, control appearance."""
        if encoders is None or adapter is None or frames is None:
            return torch.cat([half, half.flip(-1)], dim=-1), given
        geometry = adapter.encode(encoders.tokens(frames), setting.working_gib)
        target = encoders.appearance(frames)
        masked = torch.zeros_like(frames)
        masked[:, 0] = frames[:, 0]
        control = encoders.appearance(masked)
        clean = [target.sample(draws[0]), geometry.sample(draws[1])]
        return torch.cat(clean, dim=-1).float(), control.sample(draws[2])

    def run() -> tuple[float, float]:
        with _norms(setting):
            clean, control = latents()
        rays = encode_camera_batch(c2w, intrinsics, o.size, o.size)
        raw = RawConditions([text], image, control_latents(control.to(o.dtype), mask), rays)
        sample = flow_sample(scheduler, clean, noise, indices)
        with _blocks(setting):
            result = diffusion_step(transformer, sample, raw)
            result.loss.backward()
        norm = optimizer.step(LEARNING_RATE, CLIP_NORM)
        return float(result.loss.detach()), norm

    work = flops.diffusion_flops(config, o.frames, o.size)
    if encode:
        m = o.model
        work += flops.encoding_flops(m.vggt, m.wan_vae, m.geo_adapter, o.frames, o.size)
    return StepProblem(run, work)


def adapter_problem(setting: Setting, options: StepOptions) -> StepProblem:
    """Stage 1: everything, from frames to the update."""
    o = setting.options
    encoders = Encoders(setting)
    vggt, adapter = encoders.vggt, setting.adapter()
    adapter.requires_grad_(True)
    if setting.upstream:
        vggt.depth_head = upstream.UpstreamDenseHead(vggt.depth_head)  # type: ignore[assignment]
        vggt.point_head = upstream.UpstreamDenseHead(vggt.point_head)  # type: ignore[assignment]
    optimizer = _optimizer(setting, adapter, options)
    frames = _frames(setting)
    rows = o.size // stages.VAE_STRIDE
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, adapter.latent_channels, (o.frames - 1) // 4 + 1, rows, rows)
    noise = torch.randn(*shape, generator=generator).to(setting.device)

    def run() -> tuple[float, float]:
        with _norms(setting):
            target = encoders.tokens(frames)
            reference = encoders.appearance(frames)
            step = adapter_loss(
                *(adapter, vggt, target, reference, noise),
                recompute="none" if setting.upstream else options.checkpointing,
            )
            step.loss.backward()
        norm = optimizer.step(LEARNING_RATE, CLIP_NORM)
        return float(step.loss.detach()), norm

    m = o.model
    work = flops.adapter_flops(m.vggt, m.wan_vae, m.geo_adapter, o.frames, o.size)
    return StepProblem(run, work)
