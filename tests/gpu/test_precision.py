"""The transformer in 8 bits on a GPU: errors against float32, compiled, captured, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gen3r.config import TransformerConfig
from gen3r.nano import ARCHITECTURE
from gen3r.precision import FP8, Precision, apply_precision
from gen3r.transformer import Conditions, StepConstants, WanTransformer
from gen3r_kernels import (
    Backends,
    attention_quantized,
    attention_quantized_reference,
    attention_reference,
    rms_norm_rope_int8,
    rms_norm_rope_reference,
    rope_key_mean,
)
from gen3r_kernels.attention_8bit import _attention_quantized_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not hopper(), reason="the kernel is for compute capability 9.0")

# Heads of 128 and the real channels, two blocks, 3 x 10 x 20 tokens.
SMALL = TransformerConfig(text_len=16, dim=1536, ffn_dim=2048, text_dim=64, num_layers=2)
SHAPE = (16, 3, 20, 40)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def build(backends: Backends | None = None) -> WanTransformer:
    with torch.random.fork_rng(devices=["cuda"]), torch.device("cuda"):
        torch.manual_seed(0)
        model = WanTransformer(SMALL, backends or Backends())
        with torch.no_grad():
            for block in model.typed_blocks:
                block.self_attn.norm_k.weight[7::128] *= 20  # an outlier channel a head
    return model.eval().requires_grad_(False)


def given(model: WanTransformer) -> tuple[Tensor, Tensor, StepConstants]:
    """One scene, two answers: latents, tables, constants."""
    rng = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cuda")

    text, image = [normal(4, 64), normal(9, 64)], normal(2, 257, 1280)
    control = normal(1, 20, *SHAPE[1:]).repeat(2, 1, 1, 1, 1)
    conditions: Conditions = model.condition(text, image, control, None)
    tables = model.tables(torch.tensor([600.0], device="cuda"))
    return normal(1, *SHAPE), tables, model.prepare(conditions, scenes=1)


@needs_hopper
@pytest.mark.parametrize(
    "precision",
    [
        Precision(scores="int8"),
        Precision(linears="fp8"),
        Precision(linears="fp8", fused_ffn=False),
        FP8,
        Precision("fp8", "int8", keep_blocks=(0,), keep_layers=("ffn.2", "cross_attn.q")),
    ],
)
def test_a_step_against_the_references(precision: Precision) -> None:
    """The kernels' error against float32 is the references' in the same precision."""
    exact = build()
    with torch.no_grad():
        expected = exact.velocity(*given(exact))
        model = copy.deepcopy(exact).to(torch.bfloat16)
        plain = error(model.velocity(*given(model)), expected)
        reference = build(Backends(operators="reference")).to(torch.bfloat16)
        apply_precision(reference, precision)
        theirs = error(reference.velocity(*given(reference)), expected)
        apply_precision(model, precision)
        ours = error(model.velocity(*given(model)), expected)
    print(f"{precision}: bf16 {plain:.2e}, references {theirs:.2e}, kernels {ours:.2e}")
    assert ours <= 1.3 * theirs + plain


@needs_hopper
def test_compiled_and_captured() -> None:
    model = build().to(torch.bfloat16)
    apply_precision(model, FP8)
    inputs = given(model)
    with torch.no_grad():
        expected = model.velocity(*inputs)
        torch._dynamo.reset()
        step = torch.compile(model.velocity, fullgraph=True)
        compiled = step(*inputs)
        assert error(compiled, expected) < 0.02  # a tipped rounding is 3 % of one value
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*inputs)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(captured, compiled)


@needs_hopper
@pytest.mark.parametrize("rows", [128, 129, 257, 300, 4099])
def test_attention_over_quantised_operands(rows: int) -> None:
    """Strided q, k and v (one product), odd lengths, against float32 over the same operands."""
    heads, dim = 3, 128
    q, k, v = torch.randn(2, rows, 3 * heads * dim, device="cuda").bfloat16().chunk(3, dim=-1)
    angle = torch.randn(rows, dim // 2, device="cuda")
    gains, tables = torch.rand(2, heads * dim, device="cuda") + 0.5, (angle.cos(), angle.sin())
    v = v.unflatten(-1, (heads, dim))
    mean = rope_key_mean(k, gains[1], *tables, num_heads=heads)
    operands = rms_norm_rope_int8(q, k, *gains, *tables, num_heads=heads, k_mean=mean)
    poison = torch.full((2**26,), float("nan"), device="cuda")
    del poison
    ours = attention_quantized(*operands, v)
    same = attention_quantized_reference(*operands, v)
    wide = [
        rms_norm_rope_reference(x, gain, *tables, heads)
        for x, gain in zip((q, k), gains, strict=True)
    ]
    exact = attention_reference(*wide, v)
    rounding = error(same.bfloat16(), same)
    found, whole = error(ours, same), error(ours, exact)
    print(f"{rows} rows: against the operands {found:.2e}, against float32 {whole:.2e}")
    assert ours.is_contiguous() and torch.isfinite(ours).all()
    assert found <= 3 * rounding and whole < 0.02
    torch.library.opcheck(_attention_quantized_op, (*operands, v))


@needs_hopper
def test_what_the_kernels_do_not_take_is_told() -> None:
    config = replace(ARCHITECTURE.transformer, num_heads=2)
    model = WanTransformer(config, Backends()).requires_grad_(False).to("cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="int8 scores need heads of 128 channels"):
        apply_precision(model, FP8)
    apply_precision(model, Precision(linears="fp8"))
    zeros = torch.zeros(1, 130, 4, 48, device="cuda", dtype=torch.int8)
    scale = torch.ones(1, 4, 130, device="cuda")
    with pytest.raises(ValueError, match="head size 48 is not one of 128"):
        attention_quantized(zeros, scale, zeros, scale[..., :2], zeros.bfloat16())
