"""The seeded weights keep activations of order one, are sharp, and are the same in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.engine.inputs import make_inputs
from benchmarks.weights import build_transformer, fill_transformer, fingerprint
from gen3r.config import TransformerConfig
from gen3r.nano import ARCHITECTURE
from gen3r.transformer import WanTransformer
from gen3r_kernels import Backends

# Thirty blocks, as the real model has, with heads of 128 channels.
DEEP = TransformerConfig(
    text_len=32,
    dim=512,
    ffn_dim=1024,
    freq_dim=64,
    text_dim=64,
    num_heads=4,
    num_layers=30,
    clip_dim=64,
)
CONFIGS = {"nano": ARCHITECTURE.transformer, "deep": DEEP}


def build(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> WanTransformer:
    return build_transformer(config, dtype, "cpu", Backends())


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_activations_stay_of_order_one(name: str) -> None:
    transformer = build(CONFIGS[name])
    inputs = make_inputs(transformer, 5, 112)
    seen: dict[str, list[Tensor]] = {}

    def keep(kind: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
            seen.setdefault(kind, []).append(out[0] if isinstance(out, tuple) else out)

        module.register_forward_hook(hook)

    for block in transformer.typed_blocks:
        keep("stream", block)
        for kind, module in (("self", block.self_attn), ("cross", block.cross_attn)):
            keep(kind, module)
        keep("ffn", block.ffn)
    rows = torch.cat([inputs.noise] * 2)
    # Through the blocks' forward, which the hooks hear; `transformer(...)` runs each by itself.
    constants = transformer.prepare(inputs.conditions, side_by_side=True)
    velocity = transformer.velocity(rows, transformer.tables(torch.full((2,), 700.0)), constants)
    assert 0.5 < rms(velocity) < 3
    assert 0.1 < rms(velocity[0] - velocity[1]) < 2, "the text makes a difference"
    for kind in ("self", "cross", "ffn"):
        for out in seen[kind]:
            assert 0.1 < rms(out) < 2, kind
    for stream in seen["stream"]:
        # Without the few channels of constants the stream has neither vanished nor exploded.
        ordinary = stream[..., stream.abs().mean((0, 1)) < 10]
        assert 0.5 < rms(ordinary) < 4
        assert rms(ordinary - ordinary.mean(1, keepdim=True)) > 0.4, "tokens differ"
        outliers = stream.abs().mean((0, 1)) >= 15
        assert int(outliers.sum()) == max(1, CONFIGS[name].dim // 384)


@torch.no_grad()
def test_attention_is_sharp_but_looks_at_more_than_one_token() -> None:
    transformer = build(DEEP)
    inputs = make_inputs(transformer, 5, 112)
    block = transformer.typed_blocks[15].self_attn
    found: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    rows = torch.cat([inputs.noise] * 2)
    transformer(rows, torch.full((2,), 700.0), inputs.conditions, side_by_side=True)
    q, k = (
        nn.functional.rms_norm(layer(found[0]), (DEEP.dim,), norm.weight)
        .unflatten(-1, (DEEP.num_heads, -1))
        .transpose(1, 2)
        for layer, norm in ((block.q, block.norm_q), (block.k, block.norm_k))
    )  # without the rotation, which mixes positions and keeps sizes
    weights = (q @ k.mT / math.sqrt(DEEP.head_dim)).softmax(-1)
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    effective = float(entropy.exp().median())
    assert 1.5 < effective < 0.5 * weights.shape[-1]


def test_the_same_values_in_both_dtypes_and_other_ones_for_another_seed() -> None:
    single, half = build(ARCHITECTURE.transformer), build(ARCHITECTURE.transformer, torch.bfloat16)
    assert fingerprint(single) == fingerprint(half)
    for one, other in zip(single.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other.float())
    fill_transformer(half, seed=1)
    assert fingerprint(single) != fingerprint(half)


def test_inputs_do_not_depend_on_the_dtype() -> None:
    single, half = build(ARCHITECTURE.transformer), build(ARCHITECTURE.transformer, torch.bfloat16)
    a, b = make_inputs(single, 5, 56, scenes=2), make_inputs(half, 5, 56, scenes=2)
    assert torch.equal(a.noise, b.noise) and a.noise.shape == (2, 16, 2, 8, 16)
    assert torch.equal(a.conditions.control, b.conditions.control.float())
    assert a.conditions.text_lengths.tolist() == [4, 4, 17, 17]
    assert not torch.equal(a.noise[0], a.noise[1])
