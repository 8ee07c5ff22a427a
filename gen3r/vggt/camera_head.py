"""VGGT's camera head: iterative refinement of one pose encoding per view (arXiv 2503.11651)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.config import VGGTConfig
from gen3r.vggt.layers import Block, Mlp
from gen3r_kernels import Backends, layer_norm_modulate

POSE_SIZE = 9  # translation 3, quaternion xyzw 4, field of view 2 (height, width; radians)
ITERATIONS = 4


def activate_pose(
    raw: Tensor,  # [..., 9]
) -> Tensor:  # [..., 9] with a field of view of 0 or more
    """Translation and quaternion stay, the field of view goes through a ReLU (behaviour 8)."""
    return torch.cat([raw[..., :7], F.relu(raw[..., 7:])], dim=-1)


class CameraHead(nn.Module):
    """Camera tokens to pose encodings, refined `ITERATIONS` times."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        # One token a view: some attention libraries refuse a sequence of one, and none gains here.
        self.trunk = nn.Sequential(
            *(Block(dim, config.camera_num_heads, Backends()) for _ in range(config.trunk_depth))
        )
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

    def forward(
        self,
        tokens: Tensor,  # [B, S, P, 2 C] last layer; index 0 of P is the camera token
    ) -> list[Tensor]:  # pose encodings [B, S, 9] float32, one per iteration
        """Pose encodings of all iterations; the last one is the result.

        Each iteration predicts a change of the raw encoding, without gradient through earlier ones;
        the ReLU on the field of view acts on what is returned, not on what accumulates (behaviour
        8). The encoding accumulates in float32 whatever the dtype of the weights.
        """
        camera = self.token_norm(tokens[:, :, 0])
        normed = layer_norm_modulate(camera, eps=1e-6, out_dtype=camera.dtype)
        pose: Tensor | None = None
        results = []
        for _ in range(ITERATIONS):
            if pose is None:
                previous = self.empty_pose_tokens.expand(*camera.shape[:2], -1)
            else:
                previous = pose.detach().to(camera.dtype)
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, dim=-1)
            modulated = camera + gate * (normed * (1 + scale) + shift)
            change = self.pose_branch(self.trunk_norm(self.trunk(modulated))).float()
            pose = change if pose is None else pose.detach() + change
            results.append(activate_pose(pose))
        return results
