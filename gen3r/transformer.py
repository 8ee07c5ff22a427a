"""The diffusion transformer: Wan2.1 image-to-video with camera control over side-by-side latents.

One token is a 1 x 2 x 2 patch of the joint latents [appearance | geometry]; at 49 frames of
560 x 560 the grid is 13 x 35 x 70 = 31,850 tokens. Weights and matrix products are in the weights'
dtype; the residual stream, norms, time embedding and modulation are float32.

Sources: Wan2.1 (arXiv 2503.20314), Gen3R (arXiv 2601.04090); behaviours 2, 3 and 9. Module names
are the checkpoint's parameter names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.camera_control import CameraAdapter
from gen3r.config import TransformerConfig
from gen3r.rope import rope_table
from gen3r.transformer_blocks import Block, Head, ImageProjection, Norm
from gen3r_kernels import Backends, layer_norm_modulate


@dataclass(frozen=True)
class Conditions:
    """All that does not change between denoising steps.

    text : [B, text_len, C] projected text, padding included
    text_lengths : [B] int32, tokens of each prompt; behind them every row of `text` is the same
    image : [B, 257, C] projected image tokens
    cameras : [B, C, f, h, w] camera features on the token grid, or None
    control : [B, in_dim - out_dim, f, 2h, 2w] control latents and mask
    """

    text: Tensor
    text_lengths: Tensor
    image: Tensor
    cameras: Tensor | None
    control: Tensor


def sinusoidal_embedding(
    timesteps: Tensor,  # [B]
    dim: int,
) -> Tensor:  # [B, dim] float32: cosines, then sines
    """Timestep features with frequencies 10000^(-i / (dim / 2)), computed in float64."""
    half = dim // 2
    powers = torch.arange(half, device=timesteps.device, dtype=torch.float64) / half
    angles = timesteps.double()[:, None] * torch.pow(10000.0, -powers)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def pad_text(
    texts: Sequence[Tensor],  # [n_i, text_dim] each
    length: int,
) -> Tensor:  # [B, length, text_dim]
    """Zero-pad after the text encoder; the padding is projected and attended (behaviour 3)."""
    return torch.stack([F.pad(t[:length], (0, 0, 0, length - min(len(t), length))) for t in texts])


class WanTransformer(nn.Module):
    """See the module's docstring. `model(...)` predicts the flow's velocity (noise - sample)."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.backends = config, backends
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = ImageProjection(config.clip_dim, dim)
        self.control_adapter = CameraAdapter(
            config.in_dim_control_adapter, dim, (config.patch_size[1], config.patch_size[2])
        )
        self.blocks = nn.ModuleList(Block(config, backends) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def typed_blocks(self) -> list[Block]:
        """The blocks; a ModuleList forgets the class of its items."""
        return [cast(Block, block) for block in self.blocks]

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def condition(
        self,
        text: Sequence[Tensor],  # [n_i, text_dim] each, n_i <= text_len
        image: Tensor,  # [B, 257, clip_dim]
        control: Tensor,  # [B, in_dim - out_dim, f, h, w]
        cameras: Tensor | None,  # [B, 24, f, 8 h, 8 w]
    ) -> Conditions:
        """Project everything that stays the same over the denoising steps."""
        dtype = self.dtype
        padded = pad_text([t.to(dtype) for t in text], self.config.text_len)
        lengths = [min(len(t), self.config.text_len) for t in text]
        return Conditions(
            text=self.text_embedding(padded),
            text_lengths=torch.tensor(lengths, dtype=torch.int32, device=padded.device),
            image=self.img_emb(image.to(dtype)),
            cameras=None if cameras is None else self.control_adapter(cameras.to(dtype)),
            control=control.to(dtype),
        )

    def modulation(
        self,
        timesteps: Tensor,  # [B]
    ) -> tuple[list[tuple[Tensor, ...]], Norm]:
        """Per block six [B, 1, C] tables, and the head's norm; all float32."""
        features = sinusoidal_embedding(timesteps, self.config.freq_dim)
        e = _float32(self.time_embedding, features)
        e0 = _float32(self.time_projection, e).unflatten(-1, (6, -1))
        tables = [(block.modulation.float() + e0).split(1, dim=1) for block in self.typed_blocks]
        shift, scale = (self.head.modulation.float() + e[:, None]).split(1, dim=1)
        return tables, {"scale": scale, "shift": shift}

    def forward(
        self,
        latents: Tensor,  # [B, out_dim, f, h, w] joint latents
        timesteps: Tensor,  # [B], 0 to 1000
        conditions: Conditions,
        side_by_side: bool | None = None,
    ) -> Tensor:  # [B, out_dim, f, h, w] float32
        """Velocity of the joint latents.

        side_by_side: whether the width axis holds two halves that share their positions; None takes
        upstream's rule (token grid height != width).

        Raises
        ------
        ValueError : a latent grid that the patch size or the two halves do not divide.
        """
        patch = self.config.patch_size
        if any(n % p for n, p in zip(latents.shape[2:], patch, strict=True)):
            raise ValueError(
                f"latent grid {tuple(latents.shape[2:])} is not divisible by the patch {patch}"
            )
        x = self.patch_embedding(torch.cat([latents.to(self.dtype), conditions.control], dim=1))
        if conditions.cameras is not None:
            x = x + conditions.cameras
        grid = (x.shape[2], x.shape[3], x.shape[4])
        rope = rope_table(grid, self.config.head_dim, side_by_side, x.device)
        tables, head = self.modulation(timesteps)

        stream = x.flatten(2).transpose(1, 2).float()
        norms: list[Norm] = [{"shift": t[0], "scale": t[1]} for t in tables]
        norms.append(head)
        normed = layer_norm_modulate(
            stream,
            **norms[0],
            eps=self.config.eps,
            out_dtype=self.dtype,
            backends=self.backends,
        )
        for block, table, following in zip(self.typed_blocks, tables, norms[1:], strict=True):
            keys_values = block.cross_attn.keys_values(
                conditions.text, conditions.image, conditions.text_lengths
            )
            stream, normed = block(stream, normed, table, following, keys_values, rope)
        return self.unpatchify(self.head.head(normed), grid)

    def unpatchify(
        self,
        patches: Tensor,  # [B, S, prod(patch) * out_dim]
        grid: tuple[int, int, int],
    ) -> Tensor:  # [B, out_dim, f, h, w] float32
        """Tokens back to the latent grid; a patch's values lie as (t, h, w, channel)."""
        x = patches.float().unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # b c f t h p w q
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _float32(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run small linear layers in float32 whatever their weights' dtype (time embedding only)."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight.float(), layer.bias.float())
        else:
            x = layer(x)
    return x
