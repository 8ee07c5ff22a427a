"""The appearance VAE: RGB video to latents A and back (the Wan2.1 VAE, arXiv 2503.20314).

[B, 3, 4k+1, H, W] in [-1, 1] becomes [B, 16, k+1, H/8, W/8]. At the real size: 127 M parameters.
Parameter names are those of the published weights (`model.encoder...`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from gen3r.causal_vae import CausalDecoder, CausalEncoder, CausalVAE
from gen3r.config import ENCODER_PRECISIONS, AppearanceVAEConfig
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_kernels import Backends

RGB_CHANNELS = 3
SPATIAL_FACTOR = 8  # three halvings between four stages


class AppearanceVAE(VideoAutoencoder):
    """RGB video <-> appearance latents.

    `encode(video)` takes [B, 3, T, H, W] in [-1, 1] and returns the `Posterior` of
    [B, z, 1 + (T - 1) // 4, H / 8, W / 8]; `decode(latents)` returns
    [B, 3, 1 + 4 (t - 1), 8 h, 8 w] clamped to [-1, 1]; `moments(video)` gives the unscaled mu and
    the logvar stacked on channels; `encode_chunk` and `decode_chunk` take a clip piece by piece
    with an explicit cache. Frames beyond 4k+1 are dropped. Latent heights and widths are rounded
    down where the video's are no multiple of 8.

    `backends` names the transformer's attention too; the single wide head in the middle of the VAE
    does not follow it (see `gen3r.causal_video.FrameAttention`).
    """

    def __init__(self, config: AppearanceVAEConfig, backends: Backends) -> None:
        widths = tuple(config.dim * m for m in config.dim_mult)
        temporal = config.temporal_downsample
        encoder = CausalEncoder(
            RGB_CHANNELS,
            (config.dim, *widths),
            2 * config.z_dim,
            config.num_res_blocks,
            temporal,
            spatial=True,
        )
        decoder = CausalDecoder(
            config.z_dim,
            (widths[-1], *reversed(widths)),
            RGB_CHANNELS,
            config.num_res_blocks,
            temporal[::-1],
            spatial=True,
        )
        model = CausalVAE(encoder, decoder, config.z_dim)
        super().__init__(model, config.latents_mean, config.latents_std, temporal, backends)
        self.config = config
        self.encoder_precision = "model"

    def set_encoder_precision(self, precision: str) -> None:
        """Choose what `encode` computes in; decoding stays in the dtype of the weights.

        ``model`` the dtype of the weights, ``mixed`` convolutions in it and float32 between the
        blocks, ``tf32`` and ``float32`` the encoder's weights in float32 with or without TF32
        products on a GPU. In place, to be called once weights are loaded; what is rounded stays so.

        Raises
        ------
        ValueError : an unknown name.
        """
        if precision not in ENCODER_PRECISIONS:
            known = ", ".join(ENCODER_PRECISIONS)
            raise ValueError(f"encoder precision '{precision}' is unknown; known: {known}")
        dtype = next(self.model.decoder.parameters()).dtype
        if precision in ("tf32", "float32"):
            dtype = torch.float32
        self.model.encoder.to(dtype)
        self.model.conv1.to(dtype)
        cast(CausalEncoder, self.model.encoder).float32_stream = precision == "mixed"
        self.encoder_precision = precision

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What `encode` takes."""
        return next(self.model.encoder.parameters()).dtype

    @contextmanager
    def encoder_products(self) -> Iterator[None]:
        """Inside, float32 convolutions on a GPU are TF32 or not, as `encoder_precision` says."""
        settings = torch.backends.cudnn
        before = settings.allow_tf32
        if self.encoder_precision in ("tf32", "float32"):
            settings.allow_tf32 = self.encoder_precision == "tf32"
        try:
            yield
        finally:
            settings.allow_tf32 = before

    remembered = 6.0  # two frames of 7 inputs at full resolution, 14 of half, 10 of a quarter

    def largest_activation(self, height: int, width: int, *, decoding: bool) -> int:
        """The stage at full resolution: `dim` channels of `factor` frames."""
        return self.config.dim * self.temporal_factor * height * width * SPATIAL_FACTOR**2

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """An eighth of the frames' sides, rounded down."""
        return height // SPATIAL_FACTOR, width // SPATIAL_FACTOR

    def _finish(self, frames: Tensor) -> Tensor:
        return frames.clamp(-1.0, 1.0)
