"""The rows of the suite `decode`: one stage each, with its model, its inputs and both providers.

A case builds what it needs on the device with seeded random weights, the same for every provider,
and returns the call to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode import upstream
from benchmarks.engine.common import EAGER, Options, Provider, Unavailable
from benchmarks.room import room
from gen3r import stages
from gen3r.appearance_vae import AppearanceVAE
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.run import to_bytes
from gen3r.vggt import VGGT
from gen3r.vggt.camera_head import ITERATIONS
from gen3r.video_autoencoder import WORKING_GIB
from gen3r_engine.fusion import FusionConfig, fuse_points
from gen3r_kernels import Backends

SEED = 5
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Problem:
    """A case on a device.

    run : the call; modules : whose weights lie on the device; compared : whether the providers'
    outputs can be set side by side.
    """

    run: Callable[[], Any]
    modules: tuple[nn.Module, ...] = ()
    compared: bool = True


@dataclass(frozen=True)
class Setting:
    """What a case is built from. device : `meta` where only the operations are counted."""

    options: Options
    provider: Provider
    device: torch.device

    @property
    def upstream(self) -> bool:
        return self.provider.preset is None

    @property
    def backends(self) -> Backends:
        if self.upstream or self.device.type == "meta":
            return EAGER
        return Backends(attention=self.provider.choice(self.options).attention)

    @property
    def working_gib(self) -> float:
        """Of the autoencoders."""
        return upstream.ONE_FRAME if self.upstream else WORKING_GIB

    def norms(self) -> AbstractContextManager[None]:
        return upstream.upstream_norms() if self.upstream else nullcontext()

    def module(self, make: Callable[[], nn.Module]) -> Any:
        """A module with random weights: PyTorch's own initial values, which keep the scale."""
        torch.manual_seed(SEED)
        with torch.device(self.device):
            made = make()
        return made.to(self.options.dtype).eval().requires_grad_(False)

    def vae(self) -> AppearanceVAE:
        return self.module(lambda: AppearanceVAE(self.options.model.wan_vae, self.backends))

    def adapter(self) -> GeometryAdapter:
        config = self.options.model.geo_adapter
        return self.module(lambda: GeometryAdapter(config, self.backends))

    def vggt(self) -> VGGT:
        made: VGGT = self.module(lambda: VGGT(self.options.model.vggt, self.backends))
        with torch.no_grad():
            # A field of view of about one radian: untrained, the encoding may be zero, which
            # stands for an infinite focal length.
            last = made.camera_head.pose_branch.fc2
            last.weight.mul_(0.05)
            last.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]) / ITERATIONS)
        return made

    def normal(self, *shape: int) -> Tensor:
        generator = None
        if self.device.type != "meta":
            generator = torch.Generator(self.device).manual_seed(SEED)
        return torch.randn(
            *shape, device=self.device, dtype=self.options.dtype, generator=generator
        )

    def clip(self) -> Tensor:  # [1, 3, F, H, W] in [-1, 1]: one given frame, the others black
        o = self.options
        video = torch.full((1, 3, o.frames, o.size, o.size), -1.0, device=self.device)
        video[:, :, 0] = self.normal(1, 3, o.size, o.size).clamp(-1, 1).float()
        return video.to(o.dtype)

    def latents(self) -> Tensor:  # [1, 16, f, h, w]
        rows = self.options.size // stages.VAE_STRIDE
        return self.normal(1, LATENT_CHANNELS, (self.options.frames - 1) // 4 + 1, rows, rows)


def vae_encode(s: Setting) -> Problem:
    """The control video's posterior mean."""
    vae, clip = s.vae(), s.clip()

    def run() -> Tensor:
        with s.norms():
            return vae.encode(clip, s.working_gib).mean

    return Problem(run, (vae,))


def vae_decode(s: Setting) -> Problem:
    """RGB frames of the appearance latents, before they become bytes."""
    vae, latents = s.vae(), s.latents()

    def run() -> Tensor:
        with s.norms():
            return vae.decode(latents, s.working_gib)

    return Problem(run, (vae,))


def adapter_decode(s: Setting) -> Problem:
    """Token maps of the geometry latents."""
    adapter, latents = s.adapter(), s.latents()

    def run() -> Tensor:
        with s.norms():
            return adapter.decode(latents, s.working_gib)

    return Problem(run, (adapter,))


def camera_depth_heads(s: Setting) -> Problem:
    """Cameras, depth and confidence of the token maps, in the memory format the adapter leaves."""
    vggt, size = s.vggt(), s.options.size
    grid, width = size // s.options.model.vggt.patch_size, s.options.model.geo_adapter.output_dim
    maps = s.normal(1, s.options.frames, grid, grid, width)
    if s.upstream:
        channels_first = maps.permute(0, 4, 1, 2, 3).contiguous()
        maps = channels_first.permute(0, 2, 3, 4, 1)
        return Problem(lambda: upstream.camera_and_depth(vggt, maps, size, size), (vggt,))
    need = frozenset({"depth", "cameras"})

    def run() -> tuple[Tensor | None, ...]:
        g = stages.read_heads(vggt, maps, size, size, need)
        return g.depth, g.confidence, g.extrinsics, g.intrinsics

    return Problem(run, (vggt,))


def vggt_49(s: Setting) -> Problem:
    """The aggregator over all frames as views."""
    vggt, o = s.vggt(), s.options
    images = s.normal(1, o.frames, 3, o.size, o.size).sigmoid()
    return Problem(lambda: vggt.aggregator(images), (vggt.aggregator,))


def decode_stage(s: Setting) -> Problem:
    """Joint latents to frames as bytes, depth, cameras, world points and masks."""
    vae, adapter, vggt, size = s.vae(), s.adapter(), s.vggt(), s.options.size
    appearance, geometry = s.latents(), s.latents().flip(-1)
    if s.upstream:
        vggt.depth_head = upstream.UpstreamDenseHead(vggt.depth_head)  # type: ignore[assignment]

    def run() -> tuple[Tensor | None, ...]:
        with s.norms():
            pixels = to_bytes(stages.decode_appearance(vae, appearance, s.working_gib))
            g = stages.decode_geometry(adapter, vggt, geometry, size, size)
        return pixels, g.depth, g.confidence, g.extrinsics, g.intrinsics, g.points, g.mask

    return Problem(run, (vae, adapter, vggt))


def fuse_points_case(s: Setting) -> Problem:
    """All points of a clip to a filtered cloud; the host copy of the result is part of it."""
    if s.upstream:
        raise Unavailable("upstream fuses on the CPU, for minutes; see the rows of suite cpu")
    if s.device.type == "meta":
        return Problem(lambda: None)
    o = s.options
    scene = room(o.frames, o.size, o.size)
    points, colors = (t.to(s.device) for t in (scene.points[scene.mask], scene.rgb[scene.mask]))
    return Problem(lambda: fuse_points(points, colors, FusionConfig()), compared=False)


CASES: dict[str, Callable[[Setting], Problem]] = {
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "adapter_decode": adapter_decode,
    "camera_depth_heads": camera_depth_heads,
    "vggt_49": vggt_49,
    "decode_stage": decode_stage,
    "fuse_points": fuse_points_case,
}
