"""The appearance VAE: RGB video to latents A and back (the Wan2.1 VAE, arXiv 2503.20314).

[B, 3, 4k+1, H, W] in [-1, 1] becomes [B, 16, k+1, H/8, W/8]. At the real size: 127 M parameters.
Parameter names are those of the published weights (`model.encoder...`).
"""

from __future__ import annotations

from torch import Tensor

from gen3r.causal_vae import CausalDecoder, CausalEncoder, CausalVAE
from gen3r.config import AppearanceVAEConfig
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_kernels import Backends

RGB_CHANNELS = 3


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

    def _finish(self, frames: Tensor) -> Tensor:
        return frames.clamp(-1.0, 1.0)
