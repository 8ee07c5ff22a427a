"""DINOv2 with register tokens (arXiv 2304.07193, 2309.16588): VGGT's patch encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.config import VGGTConfig
from gen3r.vggt.layers import Block
from gen3r_kernels import Backends

EPS = 1e-6


class PatchProjection(nn.Module):
    """The convolution that turns patches into tokens, computed as one product of their pixels.

    Patches do not overlap. cuDNN's convolution of 49 bf16 images of 560 x 560 takes 4.8 ms on an
    H100, which is the time of 3 TFLOP for 0.09.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] to [N, h * w, C]
        size = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Normalised images to patch tokens.

    `mask_token` belongs to DINOv2's training and only keeps the checkpoint's layout.
    """

    def __init__(self, config: VGGTConfig, backends: Backends) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size = config.patch_size
        side = config.img_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.patch_embed = PatchProjection(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.vit_num_heads, backends, eps=EPS, layer_scale=1.0)
            for _ in range(config.vit_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:  # [1, rows * columns, C]
        """Patch position embedding, resampled (bicubic, antialiased, float32) to another grid."""
        stored = self.pos_embed[:, 1:]
        side = math.isqrt(stored.shape[1])
        if (rows, columns) == (side, side):
            return stored
        plane = stored.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        plane = F.interpolate(plane, (rows, columns), mode="bicubic", antialias=True)
        return plane.flatten(2).transpose(1, 2).to(stored.dtype)

    def forward(
        self,
        images: Tensor,  # [N, 3, H, W], normalised; H and W multiples of the patch size
    ) -> Tensor:  # [N, h * w, C] patch tokens after the final norm
        rows, columns = (s // self.patch_size for s in images.shape[-2:])
        count = len(images)
        x = self.patch_embed(images) + self.positions(rows, columns)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(count, -1, -1)
        x = torch.cat([cls, self.register_tokens.expand(count, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + self.register_tokens.shape[1] :]
