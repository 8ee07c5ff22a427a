"""Text and image cross-attention: two softmaxes over separate keys, outputs summed.

o = softmax(q k_t^T / sqrt(D)) v_t + softmax(q k_i^T / sqrt(D)) v_i

k_t, v_t come from the padded text context (no mask: padding keys take part, as upstream), k_i, v_i
from the 257 image tokens. Source: Wan2.1 image-to-video cross-attention (arXiv 2503.20314).

Padding is cheap. All Lt - n padding keys of a prompt with n tokens are the same vector, and so are
their values, for every padded position of the context is zero before the projections. With s their
common score, exp(s) counted Lt - n times is exp(s + log(Lt - n)): n keys and one with the bias
log(Lt - n) have the same softmax and the same output, exactly. Given `text_lengths` the kernel
reads n + 1 text keys in place of 512.

At the real size (B 2, S 31,850, H 12, D 128) q and o are 392 MB, 0.14 ms at the 2.86 TB/s of an
H100; the products are 4 B H S D operations a key, 0.5 ms for 257 + 512 keys and 0.19 ms for
257 + 5 and 257 + 78 at 600 TFLOP/s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen3r_kernels.attention import attention, attention_reference
from gen3r_kernels.attention_triton import capability_of
from gen3r_kernels.backends import Backends
from gen3r_kernels.carried import carrying, operator
from gen3r_kernels.cross_attention_backward import cross_attention_backward
from gen3r_kernels.cross_attention_triton import check_cross_operands, cross_attention_portable
from gen3r_kernels.dispatch import use_triton


def cross_attention_reference(
    q: Tensor,  # [B, S, H, D]
    k_text: Tensor,  # [B, Lt, H, D]
    v_text: Tensor,  # [B, Lt, H, D]
    k_image: Tensor,  # [B, Li, H, D]
    v_image: Tensor,  # [B, Li, H, D]
    text_lengths: Tensor | None = None,  # [B], not needed: changes no result
) -> Tensor:  # [B, S, H, D] float32
    """The definition in float32, over all keys."""
    return attention_reference(q, k_text, v_text) + attention_reference(q, k_image, v_image)


def kernel_for(
    head_dim: int,
    image_keys: int,
    has_lengths: bool,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> str:
    """Which kernel runs: "hopper", made for head size 128 and CLIP's 257 keys, or "portable"."""
    fits = has_lengths and head_dim == 128 and 256 < image_keys <= 272
    half = dtype in (torch.bfloat16, torch.float16)
    return "hopper" if capability == (9, 0) and half and fits else "portable"


@operator("cross_attention")
def _cross_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    text_lengths: Tensor | None,
) -> Tensor:
    operands = (q, k_text, v_text, k_image, v_image)
    check_cross_operands(*operands, text_lengths)
    kernel = kernel_for(
        q.shape[-1], k_image.shape[1], text_lengths is not None, q.dtype, capability_of(q)
    )
    if kernel == "portable" or text_lengths is None or carrying():
        return cross_attention_portable(*operands, text_lengths)
    from gen3r_kernels.cross_attention_hopper import MOST, cross_attention_hopper

    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cross_attention_hopper(*operands, text_lengths, o)
    if k_text.shape[1] > MOST.value:
        # How long the prompts are only the GPU knows: the other kernel takes the long ones.
        cross_attention_portable(*operands, text_lengths, o=o, leave=MOST.value)
    return o


@_cross_attention.register_fake
def _fake(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    text_lengths: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("gen3r::cross_attention_backward", mutates_args=())
def _differentiate(
    grad: Tensor,
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    text_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cross_attention_backward(grad, q, k_text, v_text, k_image, v_image, text_lengths)


@_differentiate.register_fake
def _fake_backward(grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in operands[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, *keys, lengths = ctx.saved_tensors
    if lengths is None:  # all text keys are keys of their own
        lengths = torch.full(q.shape[:1], keys[0].shape[1], dtype=torch.int32, device=q.device)
    return *_differentiate(grad.to(q.dtype), q, *keys, lengths), None


_cross_attention.register_autograd(_backward, setup_context=_save)


def cross_attention(
    q: Tensor,  # [B, S, H, D]
    k_text: Tensor,  # [B, Lt, H, D]
    v_text: Tensor,  # [B, Lt, H, D]
    k_image: Tensor,  # [B, Li, H, D]
    v_image: Tensor,  # [B, Li, H, D]
    backends: Backends,
    text_lengths: Tensor | None = None,  # [B] int32
) -> Tensor:  # [B, S, H, D], dtype of q
    """Sum of text and image attention; keys and values are given projected and normalised.

    Parameters
    ----------
    text_lengths : tokens of each prompt. A promise that in batch element b the text keys from
        position text_lengths[b] on are all equal, and their values too; it spares work and changes
        no result. Without it all text keys are read.
    backends : `attention` names the backend of both parts where the fused kernel does not run:
        with the reference operators, and in "auto" without `text_lengths`.

    Raises
    ------
    ValueError : shapes, dtypes or devices that do not fit.
    """
    # Without lengths two calls are faster: 0.84 ms against 1.15 on an H100, for 512 + 257 keys.
    fused = backends.operators == "triton" or text_lengths is not None
    if use_triton("cross_attention", q, q.dtype, backends) and fused:
        return _cross_attention(q, k_text, v_text, k_image, v_image, text_lengths)
    return attention(q, k_text, v_text, backends) + attention(q, k_image, v_image, backends)
