"""Both autoencoders: sizes, chunks, batches, caches, names (values: see the golden fixtures)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gen3r.appearance_vae import AppearanceVAE
from gen3r.causal_layers import ChunkCache
from gen3r.causal_video import Posterior
from gen3r.config import GEN3R, AppearanceVAEConfig, GeometryAdapterConfig
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.video_autoencoder import LIVE, VideoAutoencoder
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, relative_error
from tests.manifest import manifest_component, manifest_shapes

ROUNDING = COMPONENT_TOLERANCE  # other batch and chunk sizes sum in another order (seen: 5e-6)

SMALL_ADAPTER = GeometryAdapterConfig(hidden_dim=8, input_dim=20, output_dim=20, resample_scale=5)
# Channels, height and width of a clip for each kind.
CLIP = {"appearance": (3, 16, 24), "geometry": (20, 8, 4)}


def build(kind: str, backends: Backends | None = None) -> VideoAutoencoder:
    torch.manual_seed(1)
    backends = backends or Backends()
    if kind == "appearance":
        return AppearanceVAE(AppearanceVAEConfig(dim=8), backends).eval()
    return GeometryAdapter(SMALL_ADAPTER, backends).eval()


def clip(kind: str, frames: int, batch: int = 1) -> Tensor:
    channels, height, width = CLIP[kind]
    return torch.randn(batch, channels, frames, height, width)


@pytest.fixture(params=["appearance", "geometry"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_each_sample_equals_its_own_batch_of_one(kind: str) -> None:
    model, x = build(kind), clip(kind, 9, batch=3)
    posterior = model.encode(x)
    frames = model.decode(posterior.mean)
    for i in range(3):
        alone = model.encode(x[i : i + 1])
        assert relative_error(posterior.mean[i : i + 1], alone.mean) < ROUNDING
        assert relative_error(posterior.logvar[i : i + 1], alone.logvar) < ROUNDING
        again = model.decode(posterior.mean[i : i + 1])
        assert relative_error(frames[i : i + 1], again) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4, 5, 7, 13])
def test_any_frame_count_and_dropped_frames(kind: str, frames: int) -> None:
    model, x = build(kind), clip(kind, frames)
    latent_frames = 1 + (frames - 1) // 4
    kept = 4 * latent_frames - 3
    latents = model.encode(x).mean
    assert latents.shape[1:3] == (16, latent_frames)
    assert torch.equal(latents, model.encode(x[:, :, :kept]).mean)
    decoded = model.decode(latents)
    assert decoded.shape == x[:, :, :kept].shape


@torch.no_grad()
def test_latents_do_not_see_later_frames(kind: str) -> None:
    model, x = build(kind), clip(kind, 9)
    changed = x.clone()
    changed[:, :, 5:] = 0
    before, after = model.encode(x).mean, model.encode(changed).mean
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 40), (56, 16)])
def test_appearance_resolutions(height: int, width: int) -> None:
    model = build("appearance")
    video = torch.rand(1, 3, 5, height, width) * 2 - 1
    latents = model.encode(video).mode()
    assert latents.shape == (1, 16, 2, height // 8, width // 8)
    decoded = model.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_decoded_video_is_clamped() -> None:
    model = build("appearance")
    model.model.decoder.head["2"].bias.add_(torch.tensor([3.0, -3.0, 0.0]))
    decoded = model.decode(torch.randn(1, 16, 2, 2, 2))
    assert decoded[:, 0].min() == 1
    assert decoded[:, 1].max() == -1


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 12)])
def test_geometry_resolutions(height: int, width: int) -> None:
    model = build("geometry")
    tokens = torch.randn(1, 20, 5, height, width)
    latents = model.encode(tokens).mean
    assert latents.shape == (1, 16, 2, height * 7 // 4, width * 7 // 4)
    assert model.decode(latents).shape == tokens.shape


@torch.no_grad()
def test_fixed_token_grid() -> None:
    following = build("geometry")
    fixed = GeometryAdapter(replace(SMALL_ADAPTER, fixed_token_grid=(8, 4)), Backends()).eval()
    fixed.load_state_dict(following.state_dict(), strict=True)
    latents = torch.randn(1, 16, 2, 14, 7)
    assert torch.equal(fixed.decode(latents), following.decode(latents))
    assert fixed.decode(torch.randn(1, 16, 2, 9, 11)).shape == (1, 20, 5, 8, 4)
    with pytest.raises(ValueError, match=r"height 9 .*multiples of 56.*fixed_token_grid"):
        following.decode(torch.randn(1, 16, 2, 9, 14))


@torch.no_grad()
def test_larger_chunks_give_the_same(kind: str) -> None:
    model, x = build(kind), clip(kind, 13)
    cache = model.encoder_cache()
    parts = [model.encode_chunk(piece, cache) for piece in x.split([1, 12], dim=2)]
    whole = model.encode(x)
    assert relative_error(torch.cat([p.mean for p in parts], 2), whole.mean) < ROUNDING
    assert relative_error(torch.cat([p.logvar for p in parts], 2), whole.logvar) < ROUNDING

    cache = model.decoder_cache()
    frames = [model.decode_chunk(z, cache) for z in whole.mean.split([1, 3], dim=2)]
    assert relative_error(torch.cat(frames, 2), model.decode(whole.mean)) < ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 29])
def test_any_memory_budget_gives_the_same(kind: str, frames: int) -> None:
    """One latent frame a chunk, as many as there are, and a rest that is not whole."""
    model, x = build(kind), clip(kind, frames)
    count = 1 + (frames - 1) // 4
    size = model.latent_size(*x.shape[3:])
    single, middle = 1e-9, 0.7 * _gib(model, size, count)
    assert model.chunk_frames(count, 1, *size, single, decoding=True) == 1
    whole = model.encode(x, 1e3).mean
    frames_whole = model.decode(whole, 1e3)
    for budget in (single, middle):
        assert relative_error(model.encode(x, budget).mean, whole) < ROUNDING
        assert relative_error(model.decode(whole, budget), frames_whole) < ROUNDING


def _gib(model: VideoAutoencoder, size: tuple[int, int], count: int) -> float:
    unit = model.largest_activation(*size, decoding=True) * 4 / 2**30
    return unit * (LIVE * count + model.remembered)


def test_chunks_at_the_real_size() -> None:
    """49 frames of 560 x 560: chunks of equal length within the budget; half as much in bf16."""
    with torch.device("meta"):
        vae = AppearanceVAE(GEN3R.wan_vae, Backends()).bfloat16()
        adapter = GeometryAdapter(GEN3R.geo_adapter, Backends()).bfloat16()
    frames = [vae.chunk_frames(13, 1, 70, 70, gib, decoding=True) for gib in (1.0, 2.9, 4.2, 20.0)]
    assert frames == [1, 2, 4, 12]
    assert vae.float().chunk_frames(13, 1, 70, 70, 4.2, decoding=True) == 1
    assert adapter.chunk_frames(13, 1, 70, 70, 4.0, decoding=True) == 6


@torch.no_grad()
def test_precision_of_the_encoder() -> None:
    exact, x = build("appearance"), clip("appearance", 9)
    model = build("appearance").bfloat16()
    for p, q in zip(exact.parameters(), model.parameters(), strict=True):
        p.data = q.data.float()
    errors = {}
    for precision in ("model", "mixed", "tf32", "float32", "model"):
        model.set_encoder_precision(precision)
        with model.encoder_products():
            mean = model.encode(x.to(model.encoder_dtype)).mean
        wanted = exact.encode(x).mean
        errors[precision] = float((mean.float() - wanted).norm() / wanted.norm())
    assert errors["float32"] < ROUNDING < errors["mixed"] < 2 * errors["model"] < 0.02
    with pytest.raises(ValueError, match="'fp16' is unknown; known: model, mixed"):
        model.set_encoder_precision("fp16")


@torch.no_grad()
def test_interleaved_clips_and_resumed_caches(kind: str) -> None:
    """Two clips at once, each cache flattened to tensors and rebuilt between the chunks."""
    model = build(kind)
    latents = [model.encode(clip(kind, 9)).mean for _ in range(2)]
    caches = [model.decoder_cache(), model.decoder_cache()]
    frames: list[list[Tensor]] = [[], []]
    for step in range(latents[0].shape[2]):
        for i in range(2):
            frames[i].append(model.decode_chunk(latents[i][:, :, step : step + 1], caches[i]))
            caches[i] = ChunkCache.from_tensors(caches[i].flatten())
    for i in range(2):
        assert relative_error(torch.cat(frames[i], 2), model.decode(latents[i])) < ROUNDING


@torch.no_grad()
def test_a_snapshot_of_a_cache_stays_as_it_is() -> None:
    model, x = build("appearance"), clip("appearance", 9)
    cache = model.encoder_cache()
    model.encode_chunk(x[:, :, :1], cache)
    snapshot = ChunkCache.from_tensors(cache.flatten())
    first = model.encode_chunk(x[:, :, 1:5], cache).mean
    model.encode_chunk(x[:, :, 5:], cache)
    assert torch.equal(model.encode_chunk(x[:, :, 1:5], snapshot).mean, first)


def test_bad_chunks_and_shapes(kind: str) -> None:
    model, x = build(kind), clip(kind, 5)
    with pytest.raises(ValueError, match="first chunk to encode has 5 frames"):
        model.encode_chunk(x, model.encoder_cache())
    with pytest.raises(ValueError, match="first chunk to decode has 2 latent frames"):
        model.decode_chunk(torch.zeros(1, 16, 2, 7, 7), model.decoder_cache())
    cache = model.encoder_cache()
    with pytest.raises(ValueError, match="empty"):
        cache.flatten()
    model.encode_chunk(x[:, :, :1], cache)
    with pytest.raises(ValueError, match=r"has 3 frames; .* multiple of 4"):
        model.encode_chunk(x[:, :, 1:4], cache)
    with pytest.raises(ValueError, match="at least one frame"):
        model.encode(x[:, :, :0])
    with pytest.raises(ValueError, match=r"expected .*batch, channels"):
        model.encode(x[0])
    with pytest.raises(ValueError, match="8 channels; this model has 16"):
        model.decode(torch.zeros(1, 8, 1, 7, 7))


@torch.no_grad()
def test_the_transformers_attention_does_not_reach_the_autoencoders(kind: str) -> None:
    x = clip(kind, 5)
    default, other = build(kind), build(kind, Backends(attention="fa3"))
    assert torch.equal(default.encode(x).mean, other.encode(x).mean)


def test_gradients_reach_every_parameter(kind: str) -> None:
    model, x = build(kind), clip(kind, 9)
    posterior = model.encode(x)
    with torch.no_grad():  # the other way to join the chunks
        assert relative_error(model.encode(x).mean, posterior.mean.detach()) < ROUNDING
    frames = model.decode(posterior.sample(torch.randn_like(posterior.mean)) * 0.1)
    (frames.square().mean() + posterior.logvar.mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@torch.no_grad()
def test_bfloat16_runs_in_the_dtype_of_the_weights(kind: str) -> None:
    model, x = build(kind), clip(kind, 5)
    reference = model.encode(x).mean
    half = model.bfloat16().encode(x.bfloat16()).mean
    assert half.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(half.float().flatten(), reference.flatten(), 0)
    assert cosine > 0.999
    assert model.decode(half).dtype == torch.bfloat16


def test_posterior() -> None:
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    posterior = Posterior(mean, deviation.log() * 2)
    assert torch.equal(posterior.mode(), mean)
    sample = posterior.sample(torch.tensor([1.0, 2.0]))
    assert torch.allclose(sample, torch.tensor([1.5, 2.0]), atol=1e-6)


@torch.no_grad()
def test_log_variances_are_clamped_and_not_rescaled(kind: str) -> None:
    model = build(kind)
    moments = torch.full((1, 32, 1, 2, 2), 50.0)
    moments[:, 16:24] = -50.0  # the first half of the log variances
    posterior = model.posterior(moments)
    assert (posterior.logvar[:, :8] == -30).all()
    assert (posterior.logvar[:, 8:] == 20).all()
    mean = torch.tensor(model.latents_mean).view(16, 1, 1, 1)
    std = torch.tensor(model.latents_std).view(16, 1, 1, 1)
    assert torch.allclose(posterior.mean, (moments[:, :16] - mean) / std, rtol=1e-5)


@pytest.mark.parametrize("kind", CLIP)
def test_casts_of_every_part(kind: str) -> None:
    """No attribute hides a method of nn.Module, on any submodule."""
    model = build(kind)
    hidden = {n for m in model.modules() for n in vars(m) if callable(getattr(nn.Module, n, None))}
    assert hidden == set()
    assert {p.dtype for m in model.modules() for p in m.double().parameters()} == {torch.float64}


def real_models() -> dict[str, VideoAutoencoder]:
    with torch.device("meta"):
        return {
            "wan_vae": AppearanceVAE(GEN3R.wan_vae, Backends()),
            "geo_adapter": GeometryAdapter(GEN3R.geo_adapter, Backends()),
        }


def test_real_sizes_on_meta() -> None:
    models = real_models()
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert counts == {"wan_vae": 126_892_531, "geo_adapter": 317_844_304}
    assert all(t.is_meta for m in models.values() for t in m.state_dict().values())


@pytest.mark.parametrize("name", ["wan_vae", "geo_adapter"])
def test_real_names_shapes_and_constants(name: str) -> None:
    component = manifest_component(name)
    model = real_models()[name]
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert shapes == manifest_shapes(name)
    assert list(model.latents_mean) == component["constants"]["mean"]
    assert list(model.latents_std) == component["constants"]["std"]
