"""VGGT against the stored results: patch tokens, token lists, camera iterations, dense maps."""

from __future__ import annotations

import re
from functools import partialmethod

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.config import VGGTConfig
from gen3r.vggt import VGGT, token_list
from gen3r.vggt.dense_decoder import ResidualUnit, Scratch
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "vggt"


def build(golden: Golden) -> VGGT:
    model = VGGT(VGGTConfig.from_dict(golden.meta["config"]), Backends())
    model.load_state_dict(golden.weights(), strict=True)
    return model.eval()


def image_cases(golden: Golden) -> list[str]:
    return golden.cases(r"(.+)/in/images$")


def map_cases(golden: Golden) -> list[str]:
    return golden.cases(r"(.+)/in/latents$")


def numbers(golden: Golden, case: str, name: str) -> list[int]:
    """The indices i for which ``<case>/<name>_<i>`` is stored (sampled or not)."""
    return [int(i) for i in golden.cases(rf"{re.escape(case)}/{name}_(\d+)(?:_s\d+)?$")]


def check_heads(
    golden: Golden, case: str, model: VGGT, lists: list[Tensor], size: list[int]
) -> None:
    special = model.aggregator.num_special_tokens
    poses = model.camera_head(lists[-1])
    for i in numbers(golden, case, "pose_enc"):
        golden.check(f"{case}/pose_enc_{i}", poses[i])
    for head, name in ((model.depth_head, "depth"), (model.point_head, "points")):
        if golden.stored(f"{case}/{name}"):
            values, confidence = head(lists, *size, special)
            golden.check(f"{case}/{name}", values, axes=(-3, -2))
            golden.check(f"{case}/{name}_conf", confidence)


def stored_layers(golden: Golden, case: str, config: VGGTConfig) -> dict[int, int]:
    """Stored index -> layer. Files name either layers or positions in the intermediate list."""
    found = numbers(golden, case, "agg")
    by_layer = set(found) == set(config.intermediate_layer_idx) or max(found, default=0) > 3
    return {i: i if by_layer else config.intermediate_layer_idx[i] for i in found}


@torch.no_grad()
def test_images(golden: Golden) -> None:
    model = build(golden)
    for case in image_cases(golden):
        images = golden[f"{case}/in/images"]
        golden.check(f"{case}/patch_tokens", model.aggregator.patch_tokens(images))
        layers = stored_layers(golden, case, model.config)
        lists = model.aggregator(images, list(layers.values()))
        for i, tokens in zip(layers, lists, strict=True):
            golden.check(f"{case}/agg_{i}", tokens, axes=(-2,))
        check_heads(golden, case, model, model.aggregator(images), list(images.shape[-2:]))


@torch.no_grad()
def test_token_maps(golden: Golden) -> None:
    model = build(golden)
    for case in map_cases(golden):
        latents = golden[f"{case}/in/latents"]
        lists = token_list(latents, model.aggregator.num_special_tokens)
        for i in numbers(golden, case, "list"):
            golden.check(f"{case}/list_{i}", lists[i], axes=(-2,))
        size = [s * model.config.patch_size for s in latents.shape[2:4]]
        check_heads(golden, case, model, lists, size)


def plain_fuse(scratch: Scratch, levels: list[Tensor], backends: Backends, relu: bool) -> Tensor:
    """`Scratch.fuse` in upstream's order; `relu`: whether a skip carries relu(x) or x."""

    def unit(module: ResidualUnit, x: Tensor) -> Tensor:
        return module.conv2(module.conv1(x.relu()).relu()) + (x.relu() if relu else x)

    layers = (scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn)
    *finer, x = (layer(level) for layer, level in zip(layers, levels, strict=True))
    sizes = [(2 * finer[0].shape[2], 2 * finer[0].shape[3]), *(f.shape[2:] for f in finer)]
    units = (scratch.refinenet1, scratch.refinenet2, scratch.refinenet3, scratch.refinenet4)
    for refine, level, size in zip(
        reversed(units), (None, *reversed(finer)), reversed(sizes), strict=True
    ):
        if level is not None:
            x = x + unit(refine.resConfUnit1, level)
        x = unit(refine.resConfUnit2, x)
        x = refine.out_conv(F.interpolate(x, size, mode="bilinear", align_corners=True))
    return scratch.output_conv1(x) - scratch.output_conv1.bias[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("relu", [True, False], ids=["relu of the skip", "the skip itself"])
def test_skip_without_relu_is_wrong(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, relu: bool
) -> None:
    model = build(golden)
    monkeypatch.setattr(Scratch, "fuse", partialmethod(plain_fuse, relu=relu))
    special = model.aggregator.num_special_tokens
    for case in map_cases(golden):
        latents = golden[f"{case}/in/latents"]
        found = golden.stored(f"{case}/depth")
        if found is None:
            continue
        size = [s * model.config.patch_size for s in latents.shape[2:4]]
        depth, _ = model.depth_head(token_list(latents, special), *size, special)
        depth = depth[:, :, :: found[1], :: found[1]]
        right = relative_error(depth, golden[found[0]]) <= 100 * COMPONENT_TOLERANCE
        assert right == relu
