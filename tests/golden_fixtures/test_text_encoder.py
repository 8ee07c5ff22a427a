"""UMT5 through the key map against the stored features, position bias and first block."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from gen3r.config import TextEncoderConfig
from gen3r.encoders import build_text_encoder, encode_text, text_encoder_from_upstream
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "text_encoder"


def build(golden: Golden) -> UMT5EncoderModel:
    model = build_text_encoder(TextEncoderConfig.from_dict(golden.meta["config"]))
    model.load_state_dict(text_encoder_from_upstream(golden.weights()), strict=True)
    return model


def inputs(golden: Golden) -> tuple[Tensor, Tensor]:
    return golden["in/input_ids"], golden["in/attention_mask"]


def column_stride(golden: Golden, length: int, columns: int) -> int:
    """Distance of the key columns that were stored: as the note says, else as it fits."""
    fits = [s for s in range(1, length + 1) if -(-length // s) == columns]
    noted = [int(n) for n in re.findall(r"every (\d+)", str(golden.meta.get("note", "")))]
    return next((s for s in noted if s in fits), fits[0])


@torch.no_grad()
def test_features(golden: Golden) -> None:
    model = build(golden)
    first: list[Tensor] = []
    hook = model.encoder.block[0].register_forward_hook(lambda _m, _i, out: first.append(out))
    golden.check("out", encode_text(model, *inputs(golden)))
    hook.remove()
    if golden.stored("mid/block_first"):
        golden.check("mid/block_first", first[0] if isinstance(first[0], Tensor) else first[0][0])


@torch.no_grad()
def test_position_bias(golden: Golden) -> None:
    reference = golden["pos_bias_block0"]
    length, columns = reference.shape[1:]
    attention = build(golden).encoder.block[0].layer[0].SelfAttention
    stride = column_stride(golden, length, columns)
    golden.check("pos_bias_block0", attention.compute_bias(length, length)[0, :, :, ::stride])


@torch.no_grad()
def test_unpadded_equals_padded(golden: Golden) -> None:
    model = build(golden)
    for row, ids, mask in zip(golden["out"], *inputs(golden), strict=True):
        n = int(mask.sum())
        alone = encode_text(model, ids[None, :n], mask[None, :n])[0]
        golden.compare("out, tokens alone", alone, row[:n])


@torch.no_grad()
def test_attending_to_padding_is_wrong(golden: Golden) -> None:
    ids, mask = inputs(golden)
    out = encode_text(build(golden), ids, torch.ones_like(mask))
    for row, ours, valid in zip(golden["out"], out, mask, strict=True):
        n = int(valid.sum())
        if n < len(valid):
            assert relative_error(ours[:n], row[:n]) > 10 * COMPONENT_TOLERANCE
