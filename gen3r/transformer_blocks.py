"""The parts of the diffusion transformer: attention, block, head and image projection.

Source: Wan2.1 (arXiv 2503.20314). Module names are the checkpoint's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from gen3r.config import TransformerConfig
from gen3r.quantized_linear import Linear, QuantizedLinear, Rows, rows_dtype
from gen3r_kernels import (
    Backends,
    attention,
    attention_quantized,
    cross_attention,
    gated_residual,
    layer_norm_modulate,
    linear,
    linears,
    quantize,
    rms_norm,
    rms_norm_rope,
    rms_norm_rope_int8,
    rope_key_mean,
)
from gen3r_kernels.dispatch import FLOAT8

Norm = dict[str, Tensor | None]  # tables of layer_norm_modulate, by their argument names
Call = Callable[..., Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v to the output, all [B, S, H, D]


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function with its arguments: everything is kept for a backward pass."""
    return function(*arguments)


class RMSNorm(nn.Module):
    """Holds the gain of an RMSNorm; the operators compute it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def project(
    layer: Linear,
    x: Rows,  # [..., K]
    backends: Backends,
) -> Tensor:  # [..., N] in the dtype of the layer's bias
    """A linear layer, plain or in 8 bits; plain rows are quantised where the layer asks for it."""
    if isinstance(layer, QuantizedLinear) and isinstance(x, Tensor):
        x = quantize(x, backends=backends)
    y = linear(x, layer.weight, layer.bias, out_dtype=layer.bias.dtype, backends=backends)
    return cast(Tensor, y)  # out_dtype is not 8-bit


class Attention(nn.Module):
    """The projections and norms that self- and cross-attention share."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.backends = config, backends
        # `apply_precision` puts a QuantizedLinear in the place of some.
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def project(
        self,
        layer: Linear,
        x: Rows,  # [..., C]
    ) -> Tensor:  # [..., N]
        return project(layer, x, self.backends)


class SelfAttention(Attention):
    """Attention among the tokens, with rotary positions.

    qkv : None, or the layer that computes q, k and v in one product (their own layers are gone)
    int8_scores : whether scores are products of int8 (see `gen3r.precision`)
    attend : None, or what computes the attention of q, k, v in the place of the operator: where
        the tokens are spread over several GPUs
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__(config, backends)
        self.qkv: QuantizedLinear | None = None
        self.int8_scores = False
        self.attend: Attend | None = None

    def join(self, make: Callable[..., QuantizedLinear]) -> None:
        """Replace q, k and v by the one layer that `make(q, k, v)` gives."""
        self.qkv = make(self.q, self.k, self.v)
        del self.q, self.k, self.v

    @property
    def reads(self) -> torch.dtype:
        """In which dtype the rows come."""
        return rows_dtype(self.q if self.qkv is None else self.qkv)

    def queries_keys_values(
        self,
        x: Rows,  # [B, S, C]
    ) -> tuple[Tensor, ...]:  # 3 x [B, S, C]; views of one tensor where the product is one
        if self.qkv is None:
            layers = (self.q, self.k, self.v)
            if torch.is_grad_enabled() and isinstance(x, Tensor):
                return linears(x, [(layer.weight, layer.bias) for layer in layers])
            return tuple(self.project(layer, x) for layer in layers)
        return self.project(self.qkv, x).chunk(3, dim=-1)

    def forward(
        self,
        x: Rows,  # [B, S, C]
        rope: tuple[Tensor, Tensor],  # cos, sin, each [S, D / 2]
    ) -> Tensor:  # [B, S, C]
        q, k, v = self.queries_keys_values(x)
        v = v.unflatten(-1, (self.config.num_heads, -1))
        gains = (self.norm_q.weight, self.norm_k.weight)
        heads, eps, backends = self.config.num_heads, self.config.eps, self.backends
        if self.int8_scores:
            mean = rope_key_mean(k, gains[1], *rope, num_heads=heads, eps=eps, backends=backends)
            rows = rms_norm_rope_int8(
                q, k, *gains, *rope, num_heads=heads, eps=eps, k_mean=mean, backends=backends
            )
            out = attention_quantized(*rows, v, backends=backends)
        else:
            q, k = rms_norm_rope(q, k, *gains, *rope, num_heads=heads, eps=eps, backends=backends)
            out = attention(q, k, v, backends) if self.attend is None else self.attend(q, k, v)
        return self.project(self.o, out.flatten(2))


class Pending(NamedTuple):
    """What is to be added to the residual stream: y * gate.

    y : [B, S, C]; gate : [B, 1, C] float32, None for 1
    """

    y: Tensor
    gate: Tensor | None


class KeysValues(NamedTuple):
    """What cross-attention reads; the same at every denoising step. k, v: [B, L, H, D]."""

    k_text: Tensor
    v_text: Tensor
    k_image: Tensor
    v_image: Tensor
    text_lengths: Tensor  # [B] int32


class CrossAttention(Attention):
    """Text and image attention with separate keys and values, summed before `o`."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__(config, backends)
        dim = config.dim
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim)

    def keys_values(
        self,
        text: Tensor,  # [B, Lt, C]
        image: Tensor,  # [B, Li, C]
        text_lengths: Tensor,  # [B] int32
    ) -> KeysValues:
        """Constant over the denoising steps."""
        heads = (self.config.num_heads, -1)
        return KeysValues(
            self.norm(self.project(self.k, text), self.norm_k).unflatten(-1, heads),
            self.project(self.v, text).unflatten(-1, heads),
            self.norm(self.project(self.k_img, image), self.norm_k_img).unflatten(-1, heads),
            self.project(self.v_img, image).unflatten(-1, heads),
            text_lengths,
        )

    def norm(
        self,
        x: Tensor,  # [B, L, C]
        norm: RMSNorm,
    ) -> Tensor:  # [B, L, C]
        return rms_norm(x, norm.weight, self.config.eps, backends=self.backends)

    def queries(
        self,
        x: Rows,  # [B, S, C]
    ) -> Tensor:  # [B, S, H, D]
        q = self.norm(self.project(self.q, x), self.norm_q)
        return q.unflatten(-1, (self.config.num_heads, -1))

    def forward(
        self,
        q: Tensor,  # [B, S, H, D] from `queries`
        keys_values: KeysValues,
    ) -> Tensor:  # [B, S, C]
        out = cross_attention(
            q,
            keys_values.k_text,
            keys_values.v_text,
            keys_values.k_image,
            keys_values.v_image,
            self.backends,
            text_lengths=keys_values.text_lengths,
        )
        return self.project(self.o, out.flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a tanh-GELU between, which the first layer's operator applies.

    fused : whether the first layer's operator also leaves its result in 8 bits for the second
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.backends = backends
        self.fused = False

    @property
    def reads(self) -> torch.dtype:
        """In which dtype the rows come."""
        return rows_dtype(cast(Linear, self[0]))

    def forward(
        self,
        x: Rows,  # [B, S, C]
    ) -> Tensor:  # [B, S, C]
        first, last = cast(Linear, self[0]), cast(Linear, self[2])
        hidden = linear(
            x,
            first.weight,
            first.bias,
            activation="gelu_tanh",
            out_dtype=FLOAT8 if self.fused else first.bias.dtype,
            backends=self.backends,
        )
        return project(last, hidden, self.backends)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a norm.

    The block is given its first norm's output and returns the next block's, so that every residual
    update runs together with the norm that reads it.

    run : calls `alone` with its arguments; training puts activation checkpointing here
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        self.config, self.backends = config, backends
        self.self_attn = SelfAttention(config, backends)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, backends)
        self.ffn = FeedForward(config, backends)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.run: Call = call

    def forward(
        self,
        stream: Tensor,  # [B, S, C] float32
        normed: Rows,  # [B, S, C]
        modulation: tuple[Tensor, ...],  # 6 x [1 or B, 1, C] float32: shift, scale, gate, twice
        following: Norm,  # scale and shift of the norm behind this block
        keys_values: KeysValues,  # R rows, a multiple of B
        rope: tuple[Tensor, Tensor],
        following_dtype: torch.dtype,
    ) -> tuple[Tensor, Rows]:  # stream [R, S, C] and normed [R, S, C] for what follows
        """With R > B the rows are repeated R / B times where the text first tells them apart.

        following_dtype : of the rows for what follows; float8_e4m3fn leaves them `Quantized`.
        """
        _, _, attention_gate, ffn_shift, ffn_scale, ffn_gate = modulation
        affine: Norm = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        modulated: Norm = {"scale": ffn_scale, "shift": ffn_shift}
        attended = self.self_attn(normed, rope)
        query_dtype = rows_dtype(self.cross_attn.q)
        stream, normed = self.update(stream, attended, attention_gate, affine, query_dtype)
        q = self.cross_attn.queries(normed)
        repeats = keys_values.k_text.shape[0] // stream.shape[0]
        if repeats > 1:
            stream, q = stream.repeat(repeats, 1, 1), q.repeat(repeats, 1, 1, 1)
        attended = self.cross_attn(q, keys_values)
        stream, normed = self.update(stream, attended, None, modulated, self.ffn.reads)
        return self.update(stream, self.ffn(normed), ffn_gate, following, following_dtype)

    def alone(
        self,
        stream: Tensor,  # [B, S, C] float32
        pending: Pending | None,
        time: Tensor,  # [B, 6, C] float32, the projected time embedding
        text: Tensor,  # [B, Lt, C]
        image: Tensor,  # [B, Li, C]
        text_lengths: Tensor,  # [B] int32
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Pending]:  # stream [B, S, C], and what is still to be added to it
        """The block from its own parameters and nobody else's: a unit to shard or to recompute.

        `forward` computes the next block's norm together with the last residual update, with
        modulation and keys that are given; here the update is left to whoever comes next, so that
        it still runs together with the norm, and modulation and keys are made on the spot.

        pending : None in the first block.
        """
        rows = (self.modulation.float() + time).split(1, dim=1)
        shift, scale, attention_gate, ffn_shift, ffn_scale, ffn_gate = rows
        first: Norm = {"shift": shift, "scale": scale}
        affine: Norm = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        modulated: Norm = {"shift": ffn_shift, "scale": ffn_scale}
        stream, normed = add_and_norm(self, stream, pending, first, self.self_attn.reads)
        attended = Pending(self.self_attn(normed, rope), attention_gate)
        query_dtype = rows_dtype(self.cross_attn.q)
        stream, normed = add_and_norm(self, stream, attended, affine, query_dtype)
        keys_values = self.cross_attn.keys_values(text, image, text_lengths)
        attended = Pending(self.cross_attn(self.cross_attn.queries(normed), keys_values), None)
        stream, normed = add_and_norm(self, stream, attended, modulated, self.ffn.reads)
        return stream, Pending(self.ffn(normed), ffn_gate)

    def update(
        self,
        stream: Tensor,  # [B, S, C] float32
        y: Tensor,  # [B, S, C]
        gate: Tensor | None,  # [B, 1, C] float32
        norm: Norm,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Rows]:  # stream and normed
        """Add y * gate to the stream and apply the norm that follows."""
        return add_and_norm(self, stream, Pending(y, gate), norm, out_dtype)


class HasNorms(Protocol):
    """What `add_and_norm` reads: a block, or the whole transformer."""

    config: TransformerConfig
    backends: Backends


def add_and_norm(
    owner: HasNorms,
    stream: Tensor,  # [B, S, C] float32
    pending: Pending | None,
    norm: Norm,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Rows]:  # stream and normed, both [B, S, C]
    """Add what is pending to the stream and apply the norm that follows, in one pass."""
    eps, backends = owner.config.eps, owner.backends
    if pending is None:
        normed = layer_norm_modulate(
            stream, **norm, eps=eps, out_dtype=out_dtype, backends=backends
        )
        return stream, normed
    return gated_residual(
        stream, pending.y, pending.gate, **norm, eps=eps, out_dtype=out_dtype, backends=backends
    )


class Head(nn.Module):
    """The last norm's modulation and the projection to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, config.out_dim * patch)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))


class ImageProjection(nn.Module):
    """CLIP tokens to the transformer's width."""

    def __init__(self, clip_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
