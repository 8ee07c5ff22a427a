"""transformer: every intermediate and output of each case; two wrong variants must fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r.config import TransformerConfig
from gen3r.rope import rope_table
from gen3r.transformer import RawConditions, WanTransformer, pad_text, sinusoidal_embedding
from gen3r_kernels import Backends, rms_norm_rope_reference
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "transformer"


def build(golden: Golden, backends: Backends | None = None) -> WanTransformer:
    config = TransformerConfig.from_dict(
        golden.meta["config"] | {"clip_dim": golden.meta["clip_dim"]}
    )
    model = WanTransformer(config, backends or Backends())
    model.load_state_dict(golden.weights())
    return model.eval()


def inputs(golden: Golden, case: str) -> dict[str, Any]:
    meta = golden.meta["cases"][case]
    batch, grid = meta["B"], (meta["f"], meta["h"], meta["w"])
    channels = golden.meta["config"]["in_dim_control_adapter"]
    cameras = torch.zeros(batch, channels, grid[0], grid[1] * 8, grid[2] * 8)
    if f"{case}/in/y_camera" in golden:
        cameras = golden[f"{case}/in/y_camera"]
    return {
        "latents": golden[f"{case}/in/x"],
        "timesteps": golden[f"{case}/in/t"],
        "text": [golden[f"{case}/in/context_{i}"] for i in range(batch)],
        "image": golden["shared/clip_fea"][:batch],
        "control": golden[f"{case}/in/y"],
        "cameras": cameras,
    }


@torch.no_grad()
def run(model: WanTransformer, given: dict[str, Any], side_by_side: bool | None = None) -> Tensor:
    conditions = model.condition(given["text"], given["image"], given["control"], given["cameras"])
    constants = model.prepare(conditions, side_by_side)
    return model.velocity(given["latents"], model.tables(given["timesteps"]), constants)


@torch.no_grad()
def run_by_block(
    model: WanTransformer, given: dict[str, Any], side_by_side: bool | None = None
) -> Tensor:
    """The same through `forward`: each block by itself, as training runs them."""
    raw = RawConditions(given["text"], given["image"], given["control"], given["cameras"])
    return model(given["latents"], given["timesteps"], raw, side_by_side)


def test_cases(golden: Golden) -> None:
    model = build(golden)
    captured: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: captured.__setitem__(name, (args, out))

    for name, module in {
        "control_adapter": model.control_adapter,
        "text_context": model.text_embedding,
        "img_context": model.img_emb,
        "block_first": model.blocks[0],
        "block_last": model.blocks[-1],
        "head": model.head.head,
    }.items():
        module.register_forward_hook(keep(name))
    for case in golden.meta["cases"]:
        given = inputs(golden, case)
        out = run(model, given)
        # The model embeds latents and control apart; together they are the stored tensor.
        joint = torch.cat([given["latents"], given["control"]], dim=1)
        golden.check(f"{case}/mid/patch_embedding", model.patch_embedding(joint))
        for name in ("control_adapter", "text_context", "img_context", "head"):
            golden.check(f"{case}/mid/{name}", captured[name][1])
        golden.check(f"{case}/mid/block_input", captured["block_first"][0][0])
        golden.check(f"{case}/mid/block_first", captured["block_first"][1][0])
        golden.check(f"{case}/mid/block_last", captured["block_last"][1][0])
        golden.check(f"{case}/out", out)
        golden.check(f"{case}/out", run_by_block(model, given))
        with torch.no_grad():
            features = sinusoidal_embedding(given["timesteps"], model.config.freq_dim)
            e = model.time_embedding(features)
            golden.check(f"{case}/mid/e", e)
            golden.check(f"{case}/mid/e0", model.time_projection(e).unflatten(-1, (6, -1)))


def test_tables(golden: Golden) -> None:
    for case in golden.cases(r"rope(\d+/\w+)/in"):
        head_dim, variant = case.split("/")
        x = golden[f"rope{case}/in"]  # [B, S, H, D]
        grid = next(
            tuple(c["grid"])
            for c in golden.meta["cases"].values()
            if torch.Size(c["grid"]).numel() == x.shape[1] and c["rope"].startswith(variant[:5])
        )
        table = rope_table(grid, int(head_dim), None, x.device)
        # An RMSNorm is undone by handing back the root mean square as its gain.
        flat = x.flatten(2)
        scale = (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        ones = torch.ones(flat.shape[-1])
        out = rms_norm_rope_reference(flat, ones, *table, num_heads=x.shape[2])
        golden.check(f"rope{case}/out", out * scale[..., None])
    dim = golden["sinusoidal/out"].shape[-1]
    golden.check("sinusoidal/out", sinusoidal_embedding(golden["sinusoidal/t"], dim))


def test_plain_rope_on_a_joint_grid_is_wrong(golden: Golden) -> None:
    joint = [n for n, c in golden.meta["cases"].items() if c["rope"].startswith("concat")]
    if not joint:
        pytest.skip("no joint grid in this fixture")
    given = inputs(golden, joint[0])
    wrong = run(build(golden), given, side_by_side=False)
    assert relative_error(wrong, golden[f"{joint[0]}/out"]) > 10 * COMPONENT_TOLERANCE


def test_masking_the_text_padding_is_wrong(golden: Golden) -> None:
    model = build(golden)
    case = next(
        (n for n, c in golden.meta["cases"].items() if min(c["lens"]) < model.config.text_len), None
    )
    if case is None:
        pytest.skip("no padded text in this fixture")
    given = inputs(golden, case)
    row = min(range(len(given["text"])), key=lambda i: len(given["text"][i]))
    short = {k: v[row : row + 1] for k, v in given.items()}
    right = run(model, short)
    assert relative_error(right, golden[f"{case}/out"][row : row + 1]) < COMPONENT_TOLERANCE
    # A mask removes the padding keys; the same result comes from projecting no padding at all.
    with torch.no_grad():
        conditions = model.condition(
            **{k: short[k] for k in ("text", "image", "control", "cameras")}
        )
        text = model.text_embedding(pad_text(short["text"], len(short["text"][0])))
        masked = dataclasses.replace(conditions, text=text)
        wrong = model(short["latents"], short["timesteps"], masked)
    assert relative_error(wrong, golden[f"{case}/out"][row : row + 1]) > 10 * COMPONENT_TOLERANCE
