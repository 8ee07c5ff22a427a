"""Seeded random transformer weights under which activations behave like those of a trained model.

Fresh torch layers let the residual stream shrink to a constant and attention become a plain mean:
rounding errors then have nothing to act on. These weights hold, from the first block to the
velocity:

* linears N(0, 1 / inputs), with a gain that makes up for the activation before them, so that every
  product of inputs of order one is of order one; biases N(0, 0.02²);
* what the three branches of a block add to the stream has a variance of about 1 / blocks each, so
  that a stream of order one ends at about two;
* gains of the q and k norms spread over 1 to 2 and key weights that share half with the query
  weights: scores deviate by about 2.3 and a token attends to itself and its like, not to a mean;
* modulation: shifts deviate by 0.2, scales by 0.3, gates by 0.2 around 0.5, part of it from the
  timestep;
* outliers, as trained transformers have them: per 384 channels one of the stream that holds a
  constant of 20 to 50 (what reads it has weights 16 times smaller there), one gain of every key
  norm of 20 to 50 (the query norm's gain there is 10 times smaller), one of every cross-attention
  norm 8 times larger, and one hidden unit of every feed-forward 16 times larger with its output
  weights as much smaller.

All values are rounded to bfloat16 when drawn: a float32 copy of the model holds the same weights.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from gen3r.camera_control import ResidualBlock
from gen3r.config import TransformerConfig
from gen3r.transformer import WanTransformer
from gen3r_kernels import Backends

SEED = 2601
CHANNELS_PER_OUTLIER = 384
KEY_SHARE = 0.5  # of the query weights in the key weights
BRANCH_INPUT = 0.5  # attention averages what it reads; see the test of the branches' sizes
GELU_GAIN, SILU_GAIN, RELU_GAIN = 1.53, 1.68, math.sqrt(2)  # 1 / rms of f(x), x normal


class _Draw:
    """Random tensors on one device, rounded to bfloat16."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, parameter: Tensor, std: float, mean: float = 0.0) -> None:
        values = torch.empty(parameter.shape, device=parameter.device, dtype=torch.float32)
        values.normal_(mean, std, generator=self.generator)
        parameter.copy_(values.bfloat16())

    def uniform(self, parameter: Tensor, low: float, high: float) -> None:
        values = torch.empty(parameter.shape, device=parameter.device, dtype=torch.float32)
        values.uniform_(low, high, generator=self.generator)
        parameter.copy_(values.bfloat16())

    def channels(self, count: int, of: int, device: torch.device) -> Tensor:  # [count] int64
        return torch.randperm(of, generator=self.generator, device=device)[:count]

    def layer(self, layer: nn.Module, gain: float = 1.0) -> None:
        """A linear layer or a convolution: N(0, gain² / inputs)."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        self.normal(weight, gain / math.sqrt(weight[0].numel()))
        if isinstance(bias, Tensor):
            self.normal(bias, 0.02)


def build_transformer(
    config: TransformerConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    backends: Backends,
    seed: int = SEED,
) -> WanTransformer:
    """A transformer with the weights described above, made on `device` in `dtype`."""
    with torch.device("meta"):
        transformer = WanTransformer(config, backends)
    transformer = transformer.to(dtype).to_empty(device=device)
    fill_transformer(transformer, seed)
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def fill_transformer(transformer: WanTransformer, seed: int = SEED) -> None:
    """Give every parameter its value. The same seed and device give the same weights."""
    device = transformer.patch_embedding.weight.device
    draw, config = _Draw(device, seed), transformer.config
    for parameter in transformer.parameters():
        parameter.fill_(math.nan)  # what is left out below would be found at once
    loud = _fill_inputs(transformer, draw)
    outliers = max(1, config.dim // CHANNELS_PER_OUTLIER)
    branch = 1 / math.sqrt(config.num_layers)
    for block in transformer.typed_blocks:
        for rows, std, mean in (((0, 3), 0.1, 0.0), ((1, 4), 0.24, 0.0), ((2, 5), 0.1, 0.5)):
            for row in rows:
                draw.normal(block.modulation[:, row], std, mean)
        for attention in (block.self_attn, block.cross_attn):
            for layer in (attention.q, attention.k, attention.v):
                draw.layer(layer)
            share = KEY_SHARE * attention.q.weight.float()
            own = math.sqrt(1 - KEY_SHARE**2) * attention.k.weight.float()
            attention.k.weight.copy_((share + own).bfloat16())
            _fill_norms(attention.norm_q.weight, attention.norm_k.weight, outliers, draw)
        draw.layer(block.self_attn.o, branch / BRANCH_INPUT / 0.54)  # 0.54: rms of the gate
        cross = block.cross_attn
        draw.layer(cross.o, branch / BRANCH_INPUT)
        for layer in (cross.k_img, cross.v_img):
            draw.layer(layer)
        draw.uniform(cross.norm_k_img.weight, 1.0, 2.0)
        draw.uniform(block.norm3.weight, 0.8, 1.2)
        draw.normal(block.norm3.bias, 0.1)
        block.norm3.weight[draw.channels(outliers, config.dim, device)] *= 8
        _fill_feed_forward(block.ffn, branch / 0.54, outliers, draw)
    draw.layer(transformer.head.head)
    _soften(transformer, loud)
    draw.normal(transformer.head.modulation, 0.3)
    missing = [n for n, p in transformer.named_parameters() if not p.isfinite().all()]
    if missing:
        raise ValueError(f"parameters without a rule for their values: {', '.join(missing)}")


def _fill_inputs(transformer: WanTransformer, draw: _Draw) -> Tensor:
    """Patch, text, image, camera and time embeddings; returns the stream's outlier channels."""
    draw.layer(transformer.patch_embedding)
    bias = transformer.patch_embedding.bias
    assert bias is not None
    outliers = max(1, len(bias) // CHANNELS_PER_OUTLIER)
    chosen = draw.channels(outliers, len(bias), bias.device)
    size = torch.empty(outliers, device=bias.device, dtype=torch.float32)
    size.uniform_(20, 50, generator=draw.generator)
    bias[chosen] = (size * (1 - 2 * (chosen % 2))).bfloat16().to(bias.dtype)
    adapter = transformer.control_adapter
    draw.layer(adapter.conv)
    for block in adapter.residual_blocks:
        assert isinstance(block, ResidualBlock)
        draw.layer(block.conv1)
        draw.layer(block.conv2, 0.5 * RELU_GAIN)
    for module, gain in (
        (transformer.text_embedding, GELU_GAIN),
        (transformer.time_embedding, SILU_GAIN),
    ):
        draw.layer(module[0], 1.0 if gain == GELU_GAIN else math.sqrt(2))  # cosines: rms 0.7
        draw.layer(module[2], gain)
    draw.layer(transformer.time_projection[1], 0.17 * SILU_GAIN)
    norm_in, first, _, last, norm_out = transformer.img_emb.proj
    draw.layer(first)
    draw.layer(last, GELU_GAIN)
    for norm in (norm_in, norm_out):
        assert isinstance(norm, nn.LayerNorm)
        draw.uniform(norm.weight, 0.8, 1.2)
        draw.normal(norm.bias, 0.1)
    return chosen


def _soften(transformer: WanTransformer, loud: Tensor) -> None:
    """Let what reads the stream hear its outliers at a sixteenth: else all tokens become alike."""
    readers = [transformer.head.head.weight]
    for block in transformer.typed_blocks:
        own = block.self_attn
        readers += [own.q.weight, own.k.weight, own.v.weight, block.cross_attn.q.weight]
        first = block.ffn[0]
        assert isinstance(first, nn.Linear)
        readers.append(first.weight)
    for weight in readers:
        weight[:, loud] /= 16  # a power of two: no second rounding


def _fill_norms(query: Tensor, key: Tensor, outliers: int, draw: _Draw) -> None:
    """Gains of 1 to 2; in the outlier channels the keys' are large and the queries' small."""
    draw.uniform(query, 1.0, 2.0)
    draw.uniform(key, 1.0, 2.0)
    chosen = draw.channels(outliers, len(key), key.device)
    size = torch.empty(outliers, device=key.device, dtype=torch.float32)
    size.uniform_(20, 50, generator=draw.generator)
    key[chosen] = size.bfloat16().to(key.dtype)
    query[chosen] = (query[chosen].float() / 10).bfloat16().to(query.dtype)


def _fill_feed_forward(ffn: nn.Sequential, gain: float, outliers: int, draw: _Draw) -> None:
    first, last = ffn[0], ffn[2]
    draw.layer(first)
    draw.layer(last, gain * GELU_GAIN)
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    chosen = draw.channels(outliers, first.out_features, first.weight.device)
    first.weight[chosen] *= 16
    last.weight[:, chosen] /= 16


def fingerprint(transformer: nn.Module) -> str:
    """16 hex digits that differ where weights or their shapes do, whatever their float dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        values = tensor.double()
        weights = torch.arange(1, 8, device=values.device, dtype=torch.float64)
        sums = [
            values.sum(),
            values.square().sum(),
            (values.flatten()[:7] * weights[: values.numel()]).sum(),
        ]
        digest.update(f"{name} {tuple(tensor.shape)} {[f'{float(s):.9e}' for s in sums]}".encode())
    return digest.hexdigest()[:16]
