"""Intrinsics and scene scale of the conditioning views, from VGGT of the end-to-end weights."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import Tensor

from gen3r.config import VGGTConfig
from gen3r.vggt import VGGT, bootstrap
from gen3r.vggt.dense_decoder import Scratch
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error
from tests.golden_fixtures.test_vggt import plain_fuse, stored_layers

KIND = "vggt_bootstrap"


def build(golden: Golden) -> VGGT:
    weights = golden.sibling("e2e_weights")
    if not weights.path.is_file():
        pytest.skip(f"{weights.path} is not there; it holds the weights of {KIND}")
    model = VGGT(VGGTConfig.from_dict(weights.meta["configs"]["vggt"]), Backends())
    model.load_state_dict(weights.weights("vggt/"), strict=True)
    return model.eval()


def views(golden: Golden, case: str) -> Tensor:
    """[1, N, 3, H, W] in [0, 1]: the control frames enlarged to the size of the depth map."""
    control = golden[f"{case}/control_u8"]
    name, stride = golden.stored(f"{case}/depth") or pytest.fail(f"{case}: no depth stored")
    factor = golden[name].shape[2] * stride // control.shape[-2]
    assert -(-control.shape[-2] * factor // stride) == golden[name].shape[2]
    enlarged = control.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return enlarged.float()[None] / 255


@torch.no_grad()
def test_bootstrap(golden: Golden) -> None:
    model = build(golden)
    for case in golden.cases(r"(.+)/control_u8$"):
        images = views(golden, case)
        tokens = model.aggregator(images)
        layers = stored_layers(golden, case, model.config)
        for i, stored in zip(layers, model.aggregator(images, list(layers.values())), strict=True):
            golden.check(f"{case}/agg_{i}", stored, axes=(-2,))
        golden.check(f"{case}/pose_enc", model.camera_head(tokens[-1])[-1])
        special = model.aggregator.num_special_tokens
        depth, _ = model.depth_head(tokens, *images.shape[-2:], special)
        golden.check(f"{case}/depth", depth, axes=(-3, -2))
        intrinsics, scale = bootstrap(model, images)
        golden.check(f"{case}/intrinsics_first", intrinsics[:, None])
        golden.check(f"{case}/scene_scale", scale[0])


@torch.no_grad()
@pytest.mark.parametrize("relu", [True, False], ids=["relu of the skip", "the skip itself"])
def test_skip_without_relu_is_wrong(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, relu: bool
) -> None:
    model = build(golden)
    monkeypatch.setattr(Scratch, "fuse", partialmethod(plain_fuse, relu=relu))
    for case in golden.cases(r"(.+)/control_u8$"):
        images = views(golden, case)
        depth, _ = model.depth_head(model.aggregator(images), *images.shape[-2:])
        name, stride = golden.stored(f"{case}/depth") or pytest.fail(f"{case}: no depth stored")
        error = relative_error(depth[:, :, ::stride, ::stride], golden[name])
        assert (error <= 100 * COMPONENT_TOLERANCE) == relu
