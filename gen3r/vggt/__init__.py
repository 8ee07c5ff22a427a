"""VGGT-1B (arXiv 2503.11651): aggregator, camera head, dense heads, token maps."""

from __future__ import annotations

from torch import nn

from gen3r.config import VGGTConfig
from gen3r.vggt.aggregator import Aggregator
from gen3r.vggt.bootstrap import bootstrap, scene_scale
from gen3r.vggt.camera_head import CameraHead
from gen3r.vggt.dense_head import DenseHead
from gen3r.vggt.tokens import token_list, token_map, token_views
from gen3r_kernels import Backends

__all__ = ["VGGT", "bootstrap", "scene_scale", "token_list", "token_map", "token_views"]


class VGGT(nn.Module):
    """The four parts of VGGT that Gen3R uses; callers run the part they need.

    aggregator : images [B, S, 3, H, W] in [0, 1] -> token lists, each [B, S, 5 + h * w, 2 C]
    camera_head : last token list -> 4 pose encodings [B, S, 9]
    depth_head : token lists, height, width -> depth [B, S, H, W, 1], confidence [B, S, H, W]
    point_head : token lists, height, width -> points [B, S, H, W, 3], confidence [B, S, H, W]

    There is no `forward`: decoding starts from token lists that did not come from images.
    """

    def __init__(self, config: VGGTConfig, backends: Backends) -> None:
        super().__init__()
        self.config = config
        self.backends = backends
        self.aggregator = Aggregator(config, backends)
        self.camera_head = CameraHead(config)
        self.point_head = DenseHead(config, 3, exponential=False, backends=backends)
        self.depth_head = DenseHead(config, 1, exponential=True, backends=backends)
