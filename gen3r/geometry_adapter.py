"""The geometry adapter: VGGT token maps to latents G and back (Gen3R, arXiv 2601.04090).

Token maps are H/14 x W/14, latents H/8 x W/8 like the appearance latents. Encoding enlarges a token
map 1.75 times (nearest-exact) before the causal encoder, which keeps the size; decoding ends with a
resize of n to 8n/7 (nearest-exact) and a convolution of stride 2, which gives 4n/7 (behaviour
number 6). At 560x560 this is 40 -> 70 -> 80 -> 40; `fixed_token_grid=(40, 40)` gives these sizes
for any latents, as upstream. At the real size: 318 M parameters, of which 2 x 94 M are the first
and last convolution. Parameter names are those of the published weights (`model.encoder...`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.causal_layers import ChunkCache
from gen3r.causal_vae import CausalDecoder, CausalEncoder, CausalVAE
from gen3r.causal_video import per_frame
from gen3r.config import GeometryAdapterConfig
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_kernels import Backends

ENLARGEMENT = 1.75  # patches of 14 pixels to latents of 8 pixels


def token_grid(
    height: int,
    width: int,
    fixed: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Token rows and columns that latents of height x width decode to: `fixed`, or 4/7 of each.

    Raises
    ------
    ValueError : a side is not a multiple of 7 (image side not a multiple of 56), and none is fixed.
    """
    if fixed is not None:
        return fixed
    for name, side in (("height", height), ("width", width)):
        if side % 7:
            raise ValueError(
                f"geometry latents of {name} {side} have no whole token grid: {side} * 8 / 7 is no "
                f"integer; use a multiple of 7 (image sides that are multiples of 56, here "
                f"{max(1, round(side / 7)) * 56}) or set fixed_token_grid"
            )
    return height // 7 * 4, width // 7 * 4


class EnlargeTokens(nn.Module):
    """Token maps, 1.75 times enlarged, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})

    def forward(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
    ) -> Tensor:  # [B, Cout, T, 1.75 H, 1.75 W]
        return per_frame(self._resample, x)

    def _resample(self, x: Tensor) -> Tensor:
        return self.resample["1"](F.interpolate(x, scale_factor=ENLARGEMENT, mode="nearest-exact"))


class ReduceToTokens(nn.Module):
    """Resize to twice the token grid, then a convolution of stride 2, padded right and bottom."""

    def __init__(
        self, in_channels: int, out_channels: int, fixed_token_grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.fixed_token_grid = fixed_token_grid
        self.resample = nn.ModuleDict({"2": nn.Conv2d(in_channels, out_channels, 3, stride=2)})

    def forward(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
    ) -> Tensor:  # [B, Cout, T, rows, columns]
        return per_frame(self._resample, x)

    def _resample(self, x: Tensor) -> Tensor:
        rows, columns = token_grid(x.shape[2], x.shape[3], self.fixed_token_grid)
        x = F.interpolate(x, size=(2 * rows, 2 * columns), mode="nearest-exact")
        return self.resample["2"](F.pad(x, (0, 1, 0, 1)))


class TokenEncoder(CausalEncoder):
    """The causal encoder behind `EnlargeTokens`; it keeps the spatial size."""

    def __init__(self, config: GeometryAdapterConfig, widths: tuple[int, ...]) -> None:
        inner = config.input_dim // config.resample_scale
        super().__init__(
            inner,
            (widths[0], *widths),
            2 * config.latent_channels,
            config.num_res_blocks,
            config.temporal_downsample,
            spatial=False,
        )
        self.init_block = EnlargeTokens(config.input_dim, inner)

    def forward(
        self,
        x: Tensor,  # [B, input_dim, T, h14, w14]
        cache: ChunkCache,
    ) -> Tensor:  # [B, 2 z, t, h8, w8]
        return super().forward(self.init_block(x), cache)


class TokenDecoder(CausalDecoder):
    """The causal decoder, which keeps the spatial size, followed by `ReduceToTokens`."""

    def __init__(self, config: GeometryAdapterConfig, widths: tuple[int, ...]) -> None:
        inner = config.output_dim // config.resample_scale
        super().__init__(
            config.latent_channels,
            (widths[-1], *reversed(widths)),
            inner,
            config.num_res_blocks,
            config.temporal_downsample[::-1],
            spatial=False,
        )
        self.out_block = ReduceToTokens(inner, config.output_dim, config.fixed_token_grid)

    def forward(
        self,
        x: Tensor,  # [B, z, t, h8, w8]
        cache: ChunkCache,
    ) -> Tensor:  # [B, output_dim, T, h14, w14]
        return self.out_block(super().forward(x, cache))


class GeometryAdapter(VideoAutoencoder):
    """VGGT token maps <-> geometry latents.

    `encode(tokens)` takes [B, input_dim, T, h, w] and returns the `Posterior` of
    [B, z, 1 + (T - 1) // 4, 1.75 h, 1.75 w] (rounded down); `decode(latents)` returns
    [B, output_dim, 1 + 4 (t - 1), 4/7 h, 4/7 w], or the fixed token grid; `encode_chunk` and
    `decode_chunk` take a clip piece by piece with an explicit cache. Frames beyond 4k+1 are
    dropped.
    """

    def __init__(self, config: GeometryAdapterConfig, backends: Backends) -> None:
        widths = tuple(config.hidden_dim * m for m in config.dim_mult)
        model = CausalVAE(
            TokenEncoder(config, widths), TokenDecoder(config, widths), config.latent_channels
        )
        super().__init__(
            model, config.latents_mean, config.latents_std, config.temporal_downsample, backends
        )
        self.config = config

    def largest_activation(self, height: int, width: int, *, decoding: bool) -> int:
        """Enlarged token maps when encoding; token maps, or what is resized to them, decoding."""
        c = self.config
        if not decoding:
            return c.input_dim * self.temporal_factor * height * width
        rows, columns = token_grid(height, width, c.fixed_token_grid)
        wide = c.output_dim // c.resample_scale * max(height * width, 4 * rows * columns)
        return max(c.output_dim * rows * columns, wide) * self.temporal_factor

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """1.75 times the token rows and columns, rounded down."""
        return int(height * ENLARGEMENT), int(width * ENLARGEMENT)

    def decode_chunk(
        self,
        latents: Tensor,  # [B, z, t, h, w], scaled: t = 1 for a fresh cache, else any number
        cache: ChunkCache,
    ) -> Tensor:  # [B, output_dim, 1 or 4 t, rows, columns]
        """The clip's next token maps.

        Raises
        ------
        ValueError : more than one latent frame for a fresh cache; sides that are no multiple of 7
            without a fixed token grid.
        """
        token_grid(latents.shape[3], latents.shape[4], self.config.fixed_token_grid)
        return super().decode_chunk(latents, cache)
