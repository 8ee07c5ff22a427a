"""VGGT apart from the fixtures: batches, chunks, layouts, precision, checkpoint, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gen3r import stages
from gen3r.cameras import depth_bounds
from gen3r.config import GEN3R, VGGTConfig
from gen3r.vggt import VGGT, bootstrap, scene_scale, token_list, token_map, token_views
from gen3r.vggt.camera_head import ITERATIONS, activate_pose
from gen3r.vggt.dense_head import chunk_frames, inverse_log
from gen3r_kernels import Backends
from tests.manifest import manifest_shapes

TINY = VGGTConfig(
    img_size=28,
    embed_dim=16,
    depth=3,
    num_heads=2,
    vit_depth=1,
    vit_num_heads=2,
    trunk_depth=1,
    camera_num_heads=2,
    features=8,
    out_channels=(8, 8, 8, 8),
    intermediate_layer_idx=(0, 1, 1, 2),
)
ROUNDING = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def tiny() -> VGGT:
    return randomised(TINY)


def randomised(config: VGGTConfig) -> VGGT:
    """A model in which every parameter matters."""
    torch.manual_seed(1)
    model = VGGT(config, Backends())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def everything(model: VGGT, images: Tensor) -> list[Tensor]:
    tokens = model.aggregator(images)
    size = images.shape[-2:]
    special = model.aggregator.num_special_tokens
    return [
        *tokens,
        *model.camera_head(tokens[-1]),
        *model.depth_head(tokens, *size, special),
        *model.point_head(tokens, *size, special),
    ]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= ROUNDING * b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("views", "height", "width"), [(1, 28, 28), (2, 28, 56), (5, 42, 14)])
def test_samples_of_a_batch_are_independent(
    tiny: VGGT, views: int, height: int, width: int
) -> None:
    images = torch.rand(2, views, 3, height, width)
    together = everything(tiny, images)
    for i in range(2):
        for batched, alone in zip(together, everything(tiny, images[i : i + 1]), strict=True):
            assert close(batched[i : i + 1], alone)


@torch.no_grad()
def test_shapes_and_ranges(tiny: VGGT) -> None:
    images = torch.rand(1, 2, 3, 28, 42)
    tokens = tiny.aggregator(images)
    assert [list(t.shape) for t in tokens] == [[1, 2, 5 + 6, 32]] * 4
    poses = tiny.camera_head(tokens[-1])
    assert len(poses) == ITERATIONS
    assert all(p.shape == (1, 2, 9) and (p[..., 7:] >= 0).all() for p in poses)
    depth, confidence = tiny.depth_head(tokens, 28, 42)
    assert depth.shape == (1, 2, 28, 42, 1)
    assert confidence.shape == (1, 2, 28, 42)
    assert (depth > 0).all()
    assert (confidence > 1).all()
    assert tiny.point_head(tokens, 28, 42)[0].shape == (1, 2, 28, 42, 3)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_chunks_do_not_change_the_maps(tiny: VGGT, frames: int) -> None:
    tokens = [torch.randn(2, 3, 5 + 4, 32) for _ in range(4)]
    whole = tiny.point_head(tokens, 28, 28, frames_per_chunk=100)
    parts = tiny.point_head(tokens, 28, 28, frames_per_chunk=frames)
    assert all(close(p, w) for p, w in zip(parts, whole, strict=True))


@torch.no_grad()
def test_order_of_the_first_view_matters_and_of_the_rest_does_not(tiny: VGGT) -> None:
    images = torch.rand(1, 3, 3, 28, 28)
    last = tiny.aggregator(images)[-1]
    swapped = tiny.aggregator(images[:, [0, 2, 1]])[-1]
    assert close(swapped[:, [0, 2, 1]], last)
    turned = tiny.aggregator(images[:, [1, 0, 2]])[-1]
    assert not close(turned[:, [1, 0, 2]], last)


@torch.no_grad()
def test_last_layer_is_always_returned() -> None:
    config = dataclasses.replace(TINY, intermediate_layer_idx=(0, 0, 1, 1))
    model = randomised(config)
    images = torch.rand(1, 2, 3, 28, 28)
    tokens = model.aggregator(images)
    assert model.aggregator.kept_layers == (0, 0, 1, 1, 2)
    assert torch.equal(tokens[-1], model.aggregator(images, [2])[0])
    camera = token_map(tokens, 2, 2)[..., -32:]
    assert torch.equal(camera[:, :, 0, 0], tokens[-1][:, :, 0])


def test_token_map_and_list() -> None:
    tokens = [torch.randn(2, 3, 5 + 6, 8) for _ in range(4)]
    joined = token_map(tokens, 2, 3)
    assert joined.shape == (2, 3, 2, 3, 40)
    back = token_list(joined)
    for original, split in zip(tokens, back, strict=True):
        assert torch.equal(split[:, :, 5:], original[:, :, 5:])
        assert close(split[:, :, :5], tokens[-1][:, :, :1].expand(-1, -1, 5, -1))


def test_token_views_share_the_map_s_memory() -> None:
    tokens = torch.randn(2, 3, 2, 4, 40)
    layers, camera = token_views(tokens)
    for view, listed in zip(layers, token_list(tokens), strict=True):
        assert view.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
        assert torch.equal(view, listed[:, :, 5:])
        assert torch.equal(camera.expand(-1, -1, 5, -1), listed[:, :, :5])


@torch.no_grad()
def test_only_what_is_needed_is_read(tiny: VGGT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(1, 3, 2, 4, 160)
    whole = stages.read_heads(tiny, tokens, 28, 56)
    assert whole.points is not None and whole.point_map is None and whole.tokens is None
    ran: list[str] = []
    for name in ("depth_head", "point_head", "camera_head"):
        head = getattr(tiny, name)
        monkeypatch.setattr(head, "_forward_hooks", head._forward_hooks.copy())
        head.register_forward_hook(lambda *_, name=name: ran.append(name))
    for need, heads in (
        ({"depth"}, ["depth_head"]),
        ({"cameras"}, ["camera_head"]),
        ({"point_maps"}, ["point_head"]),
        ({"tokens"}, []),
    ):
        ran.clear()
        part = stages.read_heads(tiny, tokens, 28, 56, frozenset(need))
        assert ran == heads
        for field in dataclasses.fields(part):
            value, full = getattr(part, field.name), getattr(whole, field.name)
            if value is not None and full is not None:
                assert torch.equal(value, full)
    assert part.tokens is tokens and part.depth is None


def test_an_unknown_need_is_refused() -> None:
    with pytest.raises(ValueError, match="normals cannot be decoded; known: depth, cameras"):
        stages.decode_geometry(None, None, torch.zeros(1), 28, 28, need={"normals"})  # type: ignore[arg-type]


def test_chunks_fit_their_budget() -> None:
    sizes = {"height": 560, "width": 560, "features": 256, "itemsize": 2}
    assert chunk_frames(49, **sizes, budget_gib=1.25) == 13  # 4 chunks of 12 and 13
    assert chunk_frames(49, **sizes, budget_gib=0.01) == 1
    assert chunk_frames(3, **sizes, budget_gib=9.0) == 3


def test_depth_bounds_do_not_depend_on_how_frames_are_sorted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    depth = torch.rand(2, 3, 5, 7)
    depth[0, 1] = 2.0
    together = depth_bounds(depth)
    monkeypatch.setattr("gen3r.cameras.MOST_SORTED", 1)
    for whole, part in zip(together, depth_bounds(depth), strict=True):
        assert whole.shape == (2, 3) and torch.equal(whole, part)


def test_scene_scale_takes_the_lower_median_of_each_sample() -> None:
    depth = torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 6.0, 5.0, 7.0]]).view(2, 1, 2, 2, 1)
    assert torch.allclose(scene_scale(depth), torch.tensor([1.6, 4.8], dtype=torch.float64))


def test_bootstrap_of_a_batch(tiny: VGGT) -> None:
    images = torch.rand(2, 2, 3, 28, 42)
    intrinsics, scale = bootstrap(tiny, images)
    assert intrinsics.shape == (2, 3, 3)
    assert scale.shape == (2,)
    assert intrinsics[0, 0, 2] == 21
    assert intrinsics[0, 1, 2] == 14
    for i in range(2):
        _, alone = bootstrap(tiny, images[i : i + 1])
        assert scale[i].item() == pytest.approx(alone.item(), rel=1e-4)


def test_activations() -> None:
    x = torch.tensor([-2.0, 0.0, 2.0])
    assert torch.allclose(inverse_log(x), torch.tensor([-6.3890561, 0.0, 6.3890561]))
    raw = torch.full((1, 9), -1.0)
    assert activate_pose(raw).tolist() == [[-1.0] * 7 + [0.0] * 2]


@torch.no_grad()
def test_bfloat16_stays_near_float32(tiny: VGGT) -> None:
    images = torch.rand(1, 2, 3, 28, 28)
    reference = everything(tiny, images)
    half = VGGT(TINY, Backends()).to(torch.bfloat16)
    half.load_state_dict(tiny.state_dict())
    for ours, ref in zip(everything(half, images), reference, strict=True):
        cosine = torch.cosine_similarity(ours.float().flatten(), ref.flatten(), dim=0)
        assert cosine > 0.99


def test_gradients_reach_the_parameters() -> None:
    model = randomised(TINY)
    total = sum(t.float().square().mean() for t in everything(model, torch.rand(1, 2, 3, 28, 28)))
    assert isinstance(total, Tensor)
    total.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"aggregator.patch_embed.mask_token"}


def test_real_layout_is_the_checkpoint_s() -> None:
    with torch.device("meta"):
        model = VGGT(GEN3R.vggt, Backends())
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert ours == manifest_shapes("vggt")
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 3, 28, 30), "multiples of 14"), ((2, 3, 28, 28), r"\[B, S, 3, H, W\]")],
)
def test_bad_images(tiny: VGGT, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.aggregator(torch.rand(shape))


def test_bad_widths() -> None:
    with pytest.raises(ValueError, match="features 12 must be a multiple of 8"):
        VGGT(dataclasses.replace(TINY, features=12), Backends())
    with pytest.raises(ValueError, match="width 16 is not a multiple of its 3 heads"):
        VGGT(dataclasses.replace(TINY, num_heads=3), Backends())


def test_bad_tokens(tiny: VGGT) -> None:
    tokens = [torch.zeros(1, 1, 9, 32)] * 4
    with pytest.raises(ValueError, match="do not fit 28 x 42"):
        tiny.depth_head(tokens, 28, 42)
    with pytest.raises(ValueError, match="do not fit"):
        token_map(tokens, 3, 3)
    with pytest.raises(ValueError, match="token_views"):
        token_list(torch.zeros(1, 1, 2, 2, 32))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        tiny.aggregator(torch.rand(1, 1, 3, 28, 28), [3])
