"""Which parts of the diffusion transformer compute in 8 bits, applied to a loaded model in place.

fp8 linears: weights in e4m3 with a scale per output channel, rows in e4m3 with a scale per token;
the norm before a layer writes those rows in its own pass, self-attention's q, k and v are one
product, and ffn.0 leaves its GELU in 8 bits (`fused_ffn`). int8 scores: `rms_norm_rope_int8` and
`attention_quantized` in the place of `rms_norm_rope` and `attention`.

Not in 8 bits: the embeddings, the head, and cross-attention's keys and values, which are computed
once a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gen3r.quantized_linear import QuantizedLinear
from gen3r.transformer import WanTransformer
from gen3r.transformer_blocks import Block, SelfAttention

SCORES = "self_attn.scores"
LINEARS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
LAYERS = (*LINEARS, SCORES)
HEAD_DIM = 128  # of the kernel for int8 scores
ALIGNMENT = 16  # channels of 8-bit products
FP8_CAPABILITY, HOPPER = (8, 9), (9, 0)
MOST_BALANCE = 6  # binary orders of magnitude by which a channel is moved at most


@dataclass(frozen=True)
class Precision:
    """What is computed in 8 bits; "bf16" stands for the model's own dtype.

    Parameters
    ----------
    linears : "fp8" for the six products of every block named in LINEARS.
    scores : "int8" for the scores of self-attention.
    keep_blocks : blocks that stay in the model's dtype; -1 is the last.
    keep_layers : names from LAYERS that stay in the model's dtype, in every block.
    fused_ffn : ffn.0 leaves its GELU in 8 bits from its own kernel, which exists for compute
        capability 9.0 alone. False: it leaves bfloat16 and a pass of its own quantises, for the
        other GPUs with 8-bit products. The two round differently: the fused kernel knows a bound
        of the row and not its maximum.

    Raises
    ------
    ValueError : a name that is not known.
    """

    linears: Literal["bf16", "fp8"] = "bf16"
    scores: Literal["bf16", "int8"] = "bf16"
    keep_blocks: tuple[int, ...] = ()
    keep_layers: tuple[str, ...] = ()
    fused_ffn: bool = True

    def __post_init__(self) -> None:
        for field, known in (("linears", ("bf16", "fp8")), ("scores", ("bf16", "int8"))):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"precision: {field} '{getattr(self, field)}' is unknown; "
                    f"known: {', '.join(known)}"
                )
        unknown = [name for name in self.keep_layers if name not in LAYERS]
        if unknown:
            raise ValueError(
                f"precision: keep_layers {', '.join(unknown)} unknown; known: {', '.join(LAYERS)}"
            )

    def quantized(self, layer: str) -> bool:
        """Whether a layer of LAYERS computes in 8 bits outside the kept blocks."""
        wanted = self.scores == "int8" if layer == SCORES else self.linears == "fp8"
        return wanted and layer not in self.keep_layers


EXACT = Precision()
FP8 = Precision(linears="fp8", scores="int8")


def check_precision(
    transformer: WanTransformer, precision: Precision, device: torch.device
) -> None:
    """Raise ValueError where the kernels on `device` cannot take the model in this precision.

    The reference operators (a CPU, float32 in "auto", or "reference") take every model.
    """
    config, dtype = transformer.config, transformer.dtype
    count = config.num_layers
    outside = [i for i in precision.keep_blocks if not -count <= i < count]
    if outside:
        raise ValueError(f"precision: keep_blocks {outside} are outside the {count} blocks")
    mode = transformer.backends.operators
    reference = mode == "reference" or (mode == "auto" and dtype == torch.float32)
    if device.type != "cuda" or reference:
        return
    capability = torch.cuda.get_device_capability(device)
    if any(precision.quantized(name) for name in LINEARS):
        if capability < FP8_CAPABILITY:
            raise ValueError(
                f"fp8 linears need compute capability {FP8_CAPABILITY} or more, this GPU has "
                f"{capability}; use linears='bf16'"
            )
        if dtype != torch.bfloat16:
            raise ValueError(f"fp8 linears leave bfloat16, the model is in {dtype}; load it so")
        for name, size in (("dim", config.dim), ("ffn_dim", config.ffn_dim)):
            if size % ALIGNMENT:
                raise ValueError(
                    f"fp8 linears: {name} {size} is no multiple of {ALIGNMENT}; use linears='bf16'"
                )
        if precision.fused_ffn and _fused_ffn(precision) and capability != HOPPER:
            raise ValueError(
                f"fused_ffn needs compute capability {HOPPER}, this GPU has {capability}; "
                "use fused_ffn=False"
            )
    if precision.quantized(SCORES):
        if capability != HOPPER:
            raise ValueError(
                f"int8 scores need compute capability {HOPPER}, this GPU has {capability}; "
                "use scores='bf16'"
            )
        if config.head_dim != HEAD_DIM:
            raise ValueError(
                f"int8 scores need heads of {HEAD_DIM} channels, the model's have "
                f"{config.head_dim}; use scores='bf16'"
            )


def _fused_ffn(precision: Precision) -> bool:
    return precision.quantized("ffn.0") and precision.quantized("ffn.2")


@torch.no_grad()
def apply_precision(
    transformer: WanTransformer,
    precision: Precision,
    device: torch.device | str | None = None,
) -> None:
    """Change the model in place; the replaced weights are dropped.

    device : where the model will run; None: where it is.

    Raises
    ------
    ValueError : a model that has 8-bit layers already, or that the kernels on `device` cannot take
        (nothing is changed then).
    """
    where = transformer.patch_embedding.weight.device if device is None else torch.device(device)
    check_precision(transformer, precision, where)
    if any(isinstance(m, QuantizedLinear) for m in transformer.modules()) or any(
        block.self_attn.int8_scores for block in transformer.typed_blocks
    ):
        raise ValueError("the transformer is in 8 bits already; load the weights again")
    kept = {i % transformer.config.num_layers for i in precision.keep_blocks}
    for i, block in enumerate(transformer.typed_blocks):
        if i not in kept:
            _apply_to_block(block, precision)


def _apply_to_block(block: Block, precision: Precision) -> None:
    own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
    if precision.quantized(SCORES):
        balance_channels(own)
        own.int8_scores = True
    if precision.quantized("self_attn.qkv"):
        own.join(QuantizedLinear.of)
    for name, parent, layer in (
        ("self_attn.o", own, "o"),
        ("cross_attn.q", cross, "q"),
        ("cross_attn.o", cross, "o"),
        ("ffn.0", ffn, "0"),
        ("ffn.2", ffn, "2"),
    ):
        if precision.quantized(name):
            setattr(parent, layer, QuantizedLinear.of(getattr(parent, layer)))
    ffn.fused = precision.fused_ffn and _fused_ffn(precision)


def balance_channels(attention: SelfAttention) -> None:
    """Multiply q's gains and divide k's by the same numbers, so that int8 serves all channels.

    A channel that is large in k alone would take the bits of all others (error of the output 25 %
    where one channel of k is 50 times larger). Both channels of a rotary pair share a number, so
    that it commutes with the rotation; it is a power of two, so that scores do not change in any
    bit. The sizes are those of the weights for rows of variance 1 (what the norm leaves): of q
    gain^2 (|w_c|^2 + b_c^2), of k without the bias, most of which the mean of the keys takes off.
    """
    q_gain, k_gain = attention.norm_q.weight, attention.norm_k.weight

    def of_pairs(gain: Tensor, squares: Tensor) -> Tensor:  # [C] -> [C / 2]
        return (gain.float().square() * squares).unflatten(0, (-1, 2)).sum(1).clamp(min=1e-12)

    q_size = attention.q.weight.float().square().sum(1) + attention.q.bias.float().square()
    k_size = attention.k.weight.float().square().sum(1)
    ratio = of_pairs(k_gain, k_size) / of_pairs(q_gain, q_size)
    order = (ratio.log2() / 4).round().clamp(-MOST_BALANCE, MOST_BALANCE)
    factor = order.exp2().repeat_interleave(2)
    q_gain.copy_(q_gain.float() * factor)
    k_gain.copy_(k_gain.float() / factor)
