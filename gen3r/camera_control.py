"""The transformer's camera adapter: packed Pluecker maps -> features added to the patch embedding.

Source: Wan2.1-Fun control-camera checkpoints; parameter names are theirs.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

UNSHUFFLE = 8  # the VAE's spatial compression: pixel maps fold onto the latent grid


class ResidualBlock(nn.Module):
    """x + conv2(relu(conv1(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [N, C, h, w]
    ) -> Tensor:  # [N, C, h, w]
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Per frame: pixel-unshuffle by 8, a convolution with the patch as stride, residual blocks."""

    def __init__(
        self, in_dim: int, dim: int, patch_size: tuple[int, int], num_blocks: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim * UNSHUFFLE**2, dim, patch_size, stride=patch_size)
        self.residual_blocks = nn.Sequential(*(ResidualBlock(dim) for _ in range(num_blocks)))

    def forward(
        self,
        cameras: Tensor,  # [B, in_dim, f, H, W] at pixel resolution
    ) -> Tensor:  # [B, dim, f, H / 8 / ph, W / 8 / pw]
        """Camera features on the token grid.

        Raises
        ------
        ValueError : H or W not divisible by 8.
        """
        if cameras.shape[-2] % UNSHUFFLE or cameras.shape[-1] % UNSHUFFLE:
            raise ValueError(
                f"camera maps of {tuple(cameras.shape[-2:])} pixels "
                f"are not divisible by {UNSHUFFLE}"
            )
        frames = cameras.transpose(1, 2).flatten(0, 1)
        features = self.residual_blocks(self.conv(F.pixel_unshuffle(frames, UNSHUFFLE)))
        return features.unflatten(0, (cameras.shape[0], -1)).transpose(1, 2)
