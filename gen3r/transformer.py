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
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.camera_control import CameraAdapter
from gen3r.config import TransformerConfig
from gen3r.rope import rope_table
from gen3r.transformer_blocks import (
    Block,
    Head,
    ImageProjection,
    KeysValues,
    Norm,
    Pending,
    add_and_norm,
)
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


@dataclass(frozen=True)
class RawConditions:
    """What `WanTransformer.condition` takes: a forward pass given this does that first.

    Training needs it: the projections have gradients, and sharded weights are whole inside a
    forward pass only.

    text : per row [n_i, text_dim], n_i <= text_len
    image : [B, 257, clip_dim]
    control : [B, in_dim - out_dim, f, 2h, 2w]
    cameras : [B, 24, f, 16 h, 16 w] packed Pluecker maps, or None
    """

    text: Sequence[Tensor]
    image: Tensor
    control: Tensor
    cameras: Tensor | None


@dataclass(frozen=True)
class StepConstants:
    """What every denoising step reads and none changes, as `WanTransformer.prepare` makes it.

    embedding : [n, S, C] float32, the patch embedding's share of the control latents and its bias,
        plus the camera features
    keys_values : per block what cross-attention reads, R rows; R is a multiple of n
    rope : cosines and sines [S, D / 2] float32
    grid : tokens in time, height and width
    """

    embedding: Tensor
    keys_values: tuple[KeysValues, ...]
    rope: tuple[Tensor, Tensor]
    grid: tuple[int, int, int]


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


class Spread(Protocol):
    """Tokens spread over several GPUs: each keeps a part of them between embedding and head."""

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This GPU's part of all tokens along `dim`."""
        ...

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All tokens along `dim` from every GPU's part, with a derivative."""
        ...


class WanTransformer(nn.Module):
    """See the module's docstring. `model(...)` predicts the flow's velocity (noise - sample).

    spread : None, or how tokens are spread over several GPUs; `SelfAttention.attend` is then set
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.backends = config, backends
        self.spread: Spread | None = None
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
        padded = pad_text([t.to(self.dtype) for t in text], self.config.text_len)
        lengths = [min(len(t), self.config.text_len) for t in text]
        counts = torch.tensor(lengths, dtype=torch.int32, device=padded.device)
        return self.condition_padded(padded, counts, image, control, cameras)

    def condition_padded(
        self,
        text: Tensor,  # [B, text_len, text_dim], zeros behind each prompt's tokens
        text_lengths: Tensor,  # [B] int32
        image: Tensor,  # [B, 257, clip_dim]
        control: Tensor,  # [B, in_dim - out_dim, f, h, w]
        cameras: Tensor | None,  # [B, 24, f, 8 h, 8 w]
    ) -> Conditions:
        """`condition` of text that is padded already; nothing waits for a GPU."""
        dtype = self.dtype
        return Conditions(
            text=self.text_embedding(text.to(dtype)),
            text_lengths=text_lengths,
            image=self.img_emb(image.to(dtype)),
            cameras=None if cameras is None else self.control_adapter(cameras.to(dtype)),
            control=control.to(dtype),
        )

    def prepare(
        self,
        conditions: Conditions,
        side_by_side: bool | None = None,
        scenes: int | None = None,
    ) -> StepConstants:
        """Compute once what every step would compute again.

        side_by_side : whether the width axis holds two halves that share their positions; None
            takes upstream's rule (token grid height != width).
        scenes : n, where the R rows of `conditions` are n scenes several times over (with guidance
            twice) that differ in their text only: control latents and cameras are read from the
            first n rows. None: every row has its own.

        Raises
        ------
        ValueError : rows that are no multiple of the scenes, or a latent grid that the patch size
            or the two halves do not divide.
        """
        rows = conditions.text.shape[0]
        scenes = rows if scenes is None else scenes
        if scenes < 1 or rows % scenes:
            raise ValueError(f"{rows} rows of conditions are no multiple of {scenes} scenes")
        embedding, grid = self.embed_control(conditions, scenes)
        return StepConstants(
            embedding=embedding,
            keys_values=tuple(
                block.cross_attn.keys_values(
                    conditions.text, conditions.image, conditions.text_lengths
                )
                for block in self.typed_blocks
            ),
            rope=rope_table(grid, self.config.head_dim, side_by_side, embedding.device),
            grid=grid,
        )

    def embed_control(
        self,
        conditions: Conditions,
        scenes: int,
    ) -> tuple[Tensor, tuple[int, int, int]]:  # [scenes, S, C] float32, and the token grid
        """The share of control latents, bias and cameras in the patch embedding.

        Raises
        ------
        ValueError : a latent grid that the patch size does not divide.
        """
        patch, control = self.config.patch_size, conditions.control[:scenes]
        if any(n % p for n, p in zip(control.shape[2:], patch, strict=True)):
            raise ValueError(
                f"latent grid {tuple(control.shape[2:])} is not divisible by the patch {patch}"
            )
        layer = self.patch_embedding
        weight = layer.weight[:, self.config.out_dim :]
        embedding = F.conv3d(control, weight, layer.bias, layer.stride).float()
        if conditions.cameras is not None:
            embedding = embedding + conditions.cameras[:scenes].float()
        grid = (embedding.shape[2], embedding.shape[3], embedding.shape[4])
        return embedding.flatten(2).transpose(1, 2).contiguous(), grid

    def time_rows(
        self,
        timesteps: Tensor,  # [T]
    ) -> tuple[Tensor, Tensor]:  # [T, C] and [T, 6, C] float32
        """The time embedding, and what every block adds its own modulation to."""
        return self.embed_time(sinusoidal_embedding(timesteps, self.config.freq_dim))

    def embed_time(
        self,
        features: Tensor,  # [T, freq_dim] float32, of `sinusoidal_embedding`
    ) -> tuple[Tensor, Tensor]:  # [T, C] and [T, 6, C] float32
        """`time_rows` of timesteps whose features are there."""
        e = _float32(self.time_embedding, features)
        return e, _float32(self.time_projection, e).unflatten(-1, (6, -1))

    def tables(
        self,
        timesteps: Tensor,  # [T]
    ) -> Tensor:  # [T, 6 L + 2, C] float32
        """All modulation of the network at each timestep: six rows a block, then the head's two."""
        return self.modulation(*self.time_rows(timesteps))

    def modulation(
        self,
        e: Tensor,  # [T, C] float32
        e0: Tensor,  # [T, 6, C] float32
    ) -> Tensor:  # [T, 6 L + 2, C] float32
        """`tables` of a time embedding."""
        parts = [block.modulation.float() + e0 for block in self.typed_blocks]
        return torch.cat([*parts, self.head.modulation.float() + e[:, None]], dim=1)

    def embed(
        self,
        latents: Tensor,  # [n, out_dim, f, h, w]
        embedding: Tensor,  # [n, S, C] float32, of the control latents
        grid: tuple[int, int, int],
    ) -> Tensor:  # [n, S, C] float32
        """The residual stream before the first block."""
        f, h, w = grid
        p, q, r = self.config.patch_size
        x = latents.to(self.dtype).reshape(latents.shape[0], -1, f, p, h, q, w, r)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # a patch: (c, p, q, r)
        weight = self.patch_embedding.weight[:, : self.config.out_dim].flatten(1)
        return embedding + F.linear(x, weight).float()

    def velocity(
        self,
        latents: Tensor,  # [n, out_dim, f, h, w]
        tables: Tensor,  # [1 or n, 6 L + 2, C] float32, of `tables`; 1 where R > n
        constants: StepConstants,  # of R rows
    ) -> Tensor:  # [R, out_dim, f, h, w] float32
        """Velocity of the joint latents, R / n answers to each scene.

        With R > n the answers to one scene differ in their text only, and share all that comes
        before the first cross-attention: the first block's self-attention runs n rows.
        """
        count = len(self.typed_blocks)
        rows = [tables[:, i : i + 1] for i in range(tables.shape[1])]
        norms: list[Norm] = [{"shift": rows[6 * i], "scale": rows[6 * i + 1]} for i in range(count)]
        norms.append({"shift": rows[-2], "scale": rows[-1]})
        reads = [*(block.self_attn.reads for block in self.typed_blocks), self.dtype]
        stream = self.embed(latents, constants.embedding, constants.grid)
        normed = layer_norm_modulate(
            stream,
            **norms[0],
            eps=self.config.eps,
            out_dtype=reads[0],
            backends=self.backends,
        )
        for i, block in enumerate(self.typed_blocks):
            stream, normed = block(
                stream,
                normed,
                tuple(rows[6 * i : 6 * i + 6]),
                norms[i + 1],
                constants.keys_values[i],
                constants.rope,
                reads[i + 1],
            )
        return self.unpatchify(self.head.head(normed), constants.grid)

    def forward(
        self,
        latents: Tensor,  # [B, out_dim, f, h, w] joint latents
        timesteps: Tensor,  # [B], 0 to 1000
        conditions: Conditions | RawConditions,
        side_by_side: bool | None = None,
    ) -> Tensor:  # [B, out_dim, f, h, w] float32
        """Velocity of the joint latents; `side_by_side` as in `prepare`.

        Block by block through `Block.alone`: each block's parameters are read inside it, all others
        here and nowhere else, as recomputing and sharding want it.

        Raises
        ------
        ValueError : a latent grid that the patch size or the two halves do not divide.
        """
        if isinstance(conditions, RawConditions):
            given = conditions
            conditions = self.condition(given.text, given.image, given.control, given.cameras)
        e, time = self.time_rows(timesteps)
        embedding, grid = self.embed_control(conditions, len(latents))
        stream = self.embed(latents, embedding, grid)
        rope = rope_table(grid, self.config.head_dim, side_by_side, stream.device)
        if self.spread is not None:
            stream = self.spread.take(stream, 1)
            rope = (self.spread.take(rope[0], 0), self.spread.take(rope[1], 0))
        shared = (time, conditions.text, conditions.image, conditions.text_lengths, rope)
        pending: Pending | None = None
        for block in self.typed_blocks:
            stream, pending = block.run(block.alone, stream, pending, *shared)
        shift, scale = (self.head.modulation.float() + e[:, None]).split(1, dim=1)
        last: Norm = {"shift": shift, "scale": scale}
        _, normed = add_and_norm(self, stream, pending, last, self.dtype)
        patches = self.head.head(normed)
        if self.spread is not None:
            patches = self.spread.gather(patches, 1)
        return self.unpatchify(patches, grid)

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
