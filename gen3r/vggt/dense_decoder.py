"""The convolutional decoder of VGGT's dense heads (DPT, arXiv 2103.13413): four levels to one map.

What is arranged around the 3x3 convolutions:

* bias, residual and ReLU belong to the convolution that they follow (`conv2d_add_relu`), and a
  resize adds the next finer level as it writes (`resize_bilinear`);
* a level's 1x1 convolution runs before the resize that upstream has before it. Both are linear, one
  over channels, one over pixels with weights that sum to one, so that they commute (bias included);
  a quarter of the pixels remains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.config import VGGTConfig
from gen3r_kernels import Backends, conv2d_add_relu, resize_bilinear

LAST_FEATURES = 32


class ResidualUnit(nn.Module):
    """conv(relu(conv(a))) + added, where a is an activated map, relu(x).

    The skip carries relu(x), not x: upstream's first ReLU works in place (behaviour 1). So whoever
    computes x applies the ReLU at once, and nobody needs x itself.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(
        self,
        activated: Tensor,  # [N, C, h, w]
        backends: Backends,
        added: Tensor | None = None,  # [N, C, h, w], skip and others; None: the skip alone
        relu: bool = False,  # of the result
    ) -> Tensor:  # [N, C, h, w]
        hidden = conv2d_add_relu(
            activated, self.conv1.weight, self.conv1.bias, relu=True, backends=backends
        )
        return conv2d_add_relu(
            hidden,
            self.conv2.weight,
            self.conv2.bias,
            residual=activated if added is None else added,
            relu=relu,
            backends=backends,
        )


class Fusion(nn.Module):
    """Join a coarse map with the next finer level; the result is enlarged by whoever reads it.

    Without `skip` (the coarsest level) there is no unit for a second input.
    """

    def __init__(self, features: int, skip: bool = True) -> None:
        super().__init__()
        if skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(
        self,
        activated: Tensor,  # [N, C, h, w], relu of this level
        coarse: Tensor | None,  # [N, C, h', w'], the level before, None at the coarsest
        backends: Backends,
    ) -> Tensor:  # [N, C, h, w], to be enlarged
        if coarse is not None:
            size = (activated.shape[2], activated.shape[3])
            added = resize_bilinear(coarse, size, added=activated, backends=backends)
            activated = self.resConfUnit1(activated, backends, added, relu=True)
        x = self.resConfUnit2(activated, backends)
        if not x.is_contiguous(memory_format=torch.channels_last):
            return self.out_conv(x)
        # As a product of rows, which adds the bias as it writes.
        rows = x.permute(0, 2, 3, 1)
        rows = F.linear(rows, self.out_conv.weight.flatten(1), self.out_conv.bias)
        return rows.permute(0, 3, 1, 2)


class Scratch(nn.Module):
    """The convolutional decoder: four levels brought to one width and fused from coarse to fine."""

    def __init__(self, config: VGGTConfig, outputs: int) -> None:
        super().__init__()
        features = config.features
        first, second, third, fourth = config.out_channels
        self.layer1_rn = nn.Conv2d(first, features, 3, padding=1, bias=False)
        self.layer2_rn = nn.Conv2d(second, features, 3, padding=1, bias=False)
        self.layer3_rn = nn.Conv2d(third, features, 3, padding=1, bias=False)
        self.layer4_rn = nn.Conv2d(fourth, features, 3, padding=1, bias=False)
        self.refinenet1 = Fusion(features)
        self.refinenet2 = Fusion(features)
        self.refinenet3 = Fusion(features)
        self.refinenet4 = Fusion(features, skip=False)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, LAST_FEATURES, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(LAST_FEATURES, outputs, 1),
        )

    def fuse(
        self,
        levels: list[Tensor],  # 4 of [N, C_i, h_i, w_i], finest first; emptied
        backends: Backends,
    ) -> Tensor:  # [N, features / 2, 2 h_0, 2 w_0], without the last convolution's bias
        layers = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        units = (self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4)
        coarse: Tensor | None = None
        for layer, unit in zip(reversed(layers), reversed(units), strict=True):
            level = levels.pop()
            activated = conv2d_add_relu(level, layer.weight, None, relu=True, backends=backends)
            del level
            coarse = unit(activated, coarse, backends)
        assert coarse is not None  # four levels
        size = (2 * coarse.shape[2], 2 * coarse.shape[3])
        x = resize_bilinear(coarse, size, backends=backends)
        return conv2d_add_relu(x, self.output_conv1.weight, None, backends=backends)
