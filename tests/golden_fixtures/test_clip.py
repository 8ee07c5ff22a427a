"""CLIP's visual tower through the key map: pixels and the features before the last block."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from gen3r.config import ImageEncoderConfig
from gen3r.encoders import (
    build_image_encoder,
    encode_image,
    image_encoder_from_upstream,
    preprocess_clip,
)
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "clip"


def configuration(golden: Golden) -> ImageEncoderConfig:
    return ImageEncoderConfig.from_dict(golden.meta["config"])


def build(golden: Golden) -> CLIPVisionModel:
    model = build_image_encoder(configuration(golden))
    model.load_state_dict(image_encoder_from_upstream(golden.weights()), strict=True)
    return model


def pixels(golden: Golden, case: str) -> Tensor:
    image = golden[f"{case}/image_u8"].permute(2, 0, 1)[None]
    return preprocess_clip(image, configuration(golden).image_size)


@torch.no_grad()
def test_pixels_and_features(golden: Golden) -> None:
    model = build(golden)
    for case in golden.cases(r"(.+)/image_u8$"):
        ours = pixels(golden, case)
        for name in golden.cases(rf"({re.escape(case)}/pixels_\d+)(?:_s\d+)?$"):
            golden.check(name, ours)
        golden.check(f"{case}/out", encode_image(model, ours))


@torch.no_grad()
def test_bilinear_resize_is_wrong(golden: Golden) -> None:
    model, size = build(golden), configuration(golden).image_size
    for case in golden.cases(r"(.+)/image_u8$"):
        image = golden[f"{case}/image_u8"].permute(2, 0, 1)[None]
        if image.shape[-2:] == (size, size):
            continue
        bilinear = F.interpolate(image.float(), (size, size), mode="bilinear").round().byte()
        out = encode_image(model, preprocess_clip(bilinear, size))
        assert relative_error(out, golden[f"{case}/out"]) > 10 * COMPONENT_TOLERANCE


@torch.no_grad()
def test_running_the_last_block_is_wrong(golden: Golden) -> None:
    model = build(golden)
    for case in golden.cases(r"(.+)/image_u8$"):
        out = model(pixel_values=pixels(golden, case)).last_hidden_state
        assert relative_error(out, golden[f"{case}/out"]) > 100 * COMPONENT_TOLERANCE
