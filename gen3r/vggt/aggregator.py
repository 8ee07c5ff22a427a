"""VGGT's alternating attention over the tokens of all views (arXiv 2503.11651, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gen3r.config import VGGTConfig
from gen3r.vggt.layers import Block, PlaneTables, rope_tables
from gen3r.vggt.vit import VisionTransformer
from gen3r_kernels import Backends

# Mean and deviation of ImageNet, which DINOv2 expects.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Images to token lists: attention within each view, then over all views, `depth` times.

    Tokens of a view: 1 camera token, `num_register_tokens` register tokens, then h * w patches. The
    first view has its own camera and register tokens (index 0 of the parameters), all others share
    index 1.
    """

    def __init__(self, config: VGGTConfig, backends: Backends) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = VisionTransformer(config, backends)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_register_tokens, dim))
        self.frame_blocks = self._blocks(backends)
        self.global_blocks = self._blocks(backends)
        nn.init.normal_(self.camera_token, std=1e-6)
        nn.init.normal_(self.register_token, std=1e-6)

    def _blocks(self, backends: Backends) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            Block(c.embed_dim, c.num_heads, backends, qk_norm=True) for _ in range(c.depth)
        )

    @property
    def num_special_tokens(self) -> int:
        """Tokens of a view that come before its patches (upstream's patch_start_idx)."""
        return 1 + self.config.num_register_tokens

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers of the returned list in order: the dense heads' four, then always the last one."""
        chosen, last = self.config.intermediate_layer_idx, self.config.depth - 1
        return chosen if chosen[-1] == last else (*chosen, last)

    def patch_tokens(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
    ) -> Tensor:  # [B * S, h * w, C] in the dtype of the weights
        """Normalise the images and encode every view on its own.

        Raises
        ------
        ValueError : a shape other than [B, S, 3, H, W], or H or W not a multiple of the patch.
        """
        patch = self.config.patch_size
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f"VGGT takes images [B, S, 3, H, W], got {list(images.shape)}")
        if images.shape[3] % patch or images.shape[4] % patch:
            raise ValueError(
                f"VGGT takes heights and widths that are multiples of {patch}, got "
                f"{images.shape[3]} x {images.shape[4]}; resize or crop the images"
            )
        channels = zip(images.flatten(0, 1).unbind(1), IMAGE_MEAN, IMAGE_STD, strict=True)
        normalised = torch.stack([(c - mean) / std for c, mean, std in channels], dim=1)
        return self.patch_embed(normalised.to(self.camera_token.dtype))

    def _rope(self, rows: int, columns: int, device: torch.device) -> PlaneTables:
        """Tables of one view: special tokens stay unrotated (position 0), patches start at 1."""
        patches = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
        )
        special = patches.new_zeros(self.num_special_tokens, 2)
        head_dim = self.config.embed_dim // self.config.num_heads
        return rope_tables(torch.cat([special, patches]), head_dim, self.config.rope_freq)

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        layers: Sequence[int] | None = None,
    ) -> list[Tensor]:  # each [B, S, 5 + h * w, 2 C]
        """Token lists of `layers` in that order (default: `kept_layers`); no other layer is kept.

        The channels of a list are the outputs of its layer's frame block and global block.

        Raises
        ------
        ValueError : images as in `patch_tokens`, or a layer that the model does not have.
        """
        wanted = self.kept_layers if layers is None else tuple(layers)
        if not all(0 <= layer < self.config.depth for layer in wanted):
            raise ValueError(f"VGGT layers {list(wanted)} must lie in 0..{self.config.depth - 1}")
        batch, views = images.shape[:2]
        patches = self.patch_tokens(images).unflatten(0, (batch, views))
        index = torch.arange(views, device=images.device).clamp(max=1)
        special = torch.cat([self.camera_token, self.register_token], dim=2)[:, index]
        x = torch.cat([special.expand(batch, -1, -1, -1), patches], dim=2)
        size = self.config.patch_size
        rope = self._rope(images.shape[3] // size, images.shape[4] // size, images.device)

        kept: dict[int, Tensor] = {}
        for layer in range(max(wanted, default=-1) + 1):
            frame = self.frame_blocks[layer](x.flatten(0, 1), rope).unflatten(0, (batch, views))
            x = self.global_blocks[layer](frame.flatten(1, 2), rope).view_as(frame)
            if layer in wanted:
                kept[layer] = torch.cat([frame, x], dim=-1)
        return [kept[layer] for layer in wanted]
