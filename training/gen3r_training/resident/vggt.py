"""VGGT trained from exact depth, world points and cameras of clips in device memory.

A batch is drawn on the device: clips, a number of frames for all of them, frames, time order,
mirror images and colours. Depth, points and cameras are then made relative to the first drawn frame
and scaled so that its points lie at a mean distance of 1. The dense heads, which take most of a
step's time and treat every frame alone, decode a third of the frames: more clips fit into the time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gen3r.cameras import encode_pose
from gen3r.pipeline import Gen3RPipeline
from gen3r.vggt import VGGT
from gen3r.vggt.tokens import NUM_LISTS
from gen3r_training.resident.vggt_metrics import VGGTMeter
from gen3r_training.vggt_losses import VGGTLossConfig, VGGTPrediction, vggt_loss

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips
    from gen3r_training.resident.config import ResidentConfig

# Share of the batches with this many frames; the rest has all frames of the clips. One and two
# views are what intrinsics and scene scale of a request are estimated from.
SHORT = {1: 0.1, 2: 0.2, 5: 0.15, 9: 0.1}
WIDEST = 0.5  # share of the pairs that are a clip's first and last frame, as in a 2view request
MAPPED = 1 / 3  # share of a batch's frames whose maps are decoded, two at least where it has them
GAIN, CHANNEL_GAIN, GAMMA = 0.1, 0.04, 0.1  # deviations of their logarithms
HELD_OUT_BATCH = 8
# What an untrained model starts from instead of upstream's values, which suit months of training.
# Special tokens and positions (1e-6, 0.02) are no smaller than the patches they join; every block
# (LayerScale 0.01) passes gradients from the first step on; queries and keys (1) are long enough to
# choose among patches, where a mean of them all tells two views of a scene hardly apart.
TOKEN_STD, POSITION_STD, LAYER_SCALE, ATTENTION_GAIN = 0.5, 0.2, 1.0, 2.0
LAST_GAIN = 0.2  # of all heads' last layers: poses start near their bias, maps near depth 1
UNTRAINED = 1e-4  # special tokens smaller than this have never been trained


@dataclass(frozen=True)
class Views:
    """Images of B clips with S frames each, and what is true of them.

    Lengths are in scene units; the world is the first frame's camera. Maps are of D of the frames.
    """

    images: Tensor  # [B, S, 3, H, W] float32 in [0, 1]
    pose: Tensor  # [B, S, 9] float32, pose encoding
    mapped: Tensor  # [D] int64, the frames that have maps
    depth: Tensor  # [B, D, H, W] float32, 0 where none is known
    points: Tensor  # [B, D, H, W, 3] float32, world


def rotated(
    rotation: Tensor,  # [..., 3, 3]
    vectors: Tensor,  # [..., 3], broadcast with the rotations' batch axes
) -> Tensor:  # [..., 3]
    """R v in full float32: a matrix unit would round to TF32 where that is allowed."""
    x, y, z = vectors.unsqueeze(-1).unbind(-2)  # [..., 1] each
    result = rotation[..., 0] * x
    result = torch.addcmul(result, rotation[..., 1], y)
    return torch.addcmul(result, rotation[..., 2], z)


def camera_points(
    depth: Tensor,  # [B, S, H, W]
    intrinsics: Tensor,  # [B, 3, 3] pixels
) -> Tensor:  # [B, S, H, W, 3]
    """The pixels' points in their own camera; pixel centres lie at +0.5."""
    height, width = depth.shape[-2:]
    focal, center = intrinsics.diagonal(dim1=-2, dim2=-1)[:, :2], intrinsics[:, :2, 2]
    u = torch.arange(width, device=depth.device) + 0.5
    v = torch.arange(height, device=depth.device) + 0.5
    across = (u - center[:, :1]) / focal[:, :1]  # [B, W]
    down = (v - center[:, 1:]) / focal[:, 1:]  # [B, H]
    x, y = depth * across[:, None, None, :], depth * down[:, None, :, None]
    return torch.stack([x, y, depth], dim=-1)


def relative_to_first(
    images: Tensor,  # [B, S, 3, H, W] float32 in [0, 1]
    depth: Tensor,  # [B, S, H, W] float32, 0 where none is known
    c2w: Tensor,  # [B, S, 4, 4] float32, rigid
    intrinsics: Tensor,  # [B, 3, 3] pixels, centred principal point
    mapped: Tensor | None = None,  # [D] int64, frames to give maps of; None: all
) -> Views:
    """World and unit of the first frame: see `Views`. Without any depth there the unit stays."""
    rotation, place = c2w[..., :3, :3], c2w[..., :3, 3]
    inverse = rotation[:, :1].mT  # [B, 1, 3, 3]
    turned = (inverse.unsqueeze(-2) * rotation.mT.unsqueeze(-3)).sum(-1)  # R_0^T R_i
    first = camera_points(depth[:, :1], intrinsics)
    known = (depth[:, 0] > 0).sum((-2, -1))
    distance = torch.linalg.vector_norm(first, dim=-1).sum((1, 2, 3))  # 0 where none is known
    unit = torch.where(known > 0, distance / known.clamp(min=1), 1.0)
    moved = rotated(inverse, place - place[:, :1]) / unit[:, None, None]  # camera places
    back = turned.mT
    extrinsics = torch.cat([back, -rotated(back, moved)[..., None]], dim=-1)
    lens = intrinsics[:, None].expand(-1, depth.shape[1], -1, -1)
    pose = encode_pose(extrinsics, lens, *depth.shape[-2:])

    if mapped is None:
        mapped = torch.arange(depth.shape[1], device=depth.device)
    depth = depth[:, mapped] / unit[:, None, None, None]
    points = rotated(turned[:, mapped, None, None], camera_points(depth, intrinsics))
    points = points + moved[:, mapped, None, None]
    return Views(images, pose, mapped, depth, torch.where((depth > 0)[..., None], points, 0.0))


def mirrored(
    flags: Tensor,  # [B] bool
    images: Tensor,  # [B, S, 3, H, W]
    depth: Tensor,  # [B, S, H, W]
    c2w: Tensor,  # [B, S, 4, 4]
    intrinsics: Tensor,  # [B, 3, 3]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as given
    """Flagged clips left and right exchanged: poses M C M with M = diag(-1, 1, 1, 1)."""
    images = torch.where(flags[:, None, None, None, None], images.flip(-1), images)
    depth = torch.where(flags[:, None, None, None], depth.flip(-1), depth)
    m = torch.ones(4, device=c2w.device)
    m[0] = -1
    c2w = torch.where(flags[:, None, None, None], c2w * m[:, None] * m, c2w)
    other = intrinsics.clone()
    other[:, 0, 2] = images.shape[-1] - intrinsics[:, 0, 2]
    return images, depth, c2w, torch.where(flags[:, None, None], other, intrinsics)


def recolored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another exposure, white balance and gamma for every clip of [B, S, 3, H, W]."""
    count, device = len(images), images.device
    both = torch.randn(count, 1, 2, generator=generator, device=device)
    channels = torch.randn(count, 3, generator=generator, device=device)
    gain = (GAIN * both[..., 0] + CHANNEL_GAIN * channels).exp()[:, None, :, None, None]
    gamma = (GAMMA * both[..., 1]).exp()[:, None, :, None, None]
    return (images.clamp(min=1e-4) ** gamma * gain).clamp(max=1.0)


def taken(
    clips: Clips,
    numbers: Tensor,  # [B] int64
    frames: Tensor,  # [B, S] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, depth, c2w [B, S, 4, 4] and intrinsics [B, 3, 3] of the clips' frames, as stored."""
    rows = numbers[:, None]
    images = clips.rgb[rows, frames].permute(0, 1, 4, 2, 3).float() / 255
    depth = clips.depth[rows, frames].float()
    return images, depth, clips.c2w[rows, frames], clips.intrinsics[numbers]


def frame_count(generator: torch.Generator, most: int) -> int:
    """Frames of a batch, by the shares of `SHORT`.

    A pure function of the generator's state, which lies on the host whatever its device: the shape
    of a batch is known without waiting for the device.
    """
    state = zlib.crc32(generator.get_state().numpy().tobytes())
    host = torch.Generator().manual_seed(state)
    at, below = float(torch.rand((), generator=host)), 0.0
    for count, share in SHORT.items():
        below += share
        if at < below and count < most:
            return count
    return most


def draw_frames(
    generator: torch.Generator, clips: int, frames: int, most: int
) -> Tensor:  # [clips, frames] int64
    """Distinct frames of each clip in order of time, or of time reversed in half of the clips."""
    device = generator.device
    keys = torch.rand(clips, most, generator=generator, device=device)
    coins = torch.rand(clips, 2, 1, generator=generator, device=device)
    if frames == 2:
        keys[:, :: max(1, most - 1)] -= (coins[:, 0] < WIDEST).float()
    chosen = keys.argsort(dim=1)[:, :frames].sort(dim=1).values
    return torch.where(coins[:, 1] < 0.5, chosen.flip(1), chosen)


def draw_views(clips: Clips, generator: torch.Generator, count: int) -> Views:
    """A batch of about `count` times all frames of a clip: fewer frames of more clips, or all."""
    stored, most = clips.depth.shape[:2]
    frames = frame_count(generator, most)
    batch, device = max(1, round(count * most / frames)), generator.device
    numbers = torch.randint(stored, (batch,), generator=generator, device=device)
    chosen = draw_frames(generator, batch, frames, most)
    flags = torch.rand(batch, generator=generator, device=device) < 0.5
    images, depth, c2w, intrinsics = mirrored(flags, *taken(clips, numbers, chosen))
    order = torch.rand(frames, generator=generator, device=device).argsort()
    mapped = order[: max(min(frames, 2), math.ceil(frames * MAPPED))]
    return relative_to_first(recolored(images, generator), depth, c2w, intrinsics, mapped)


def held_out_views(clips: Clips) -> Iterator[Views]:
    """All clips with all frames in order, in batches."""
    device, frames = clips.depth.device, clips.depth.shape[1]
    every = torch.arange(frames, device=device)
    numbers = torch.arange(len(clips), device=device)
    for part in numbers.split(HELD_OUT_BATCH):
        yield relative_to_first(*taken(clips, part, every.expand(len(part), -1)))


def predict(
    vggt: VGGT,
    images: Tensor,  # [B, S, 3, H, W] in [0, 1]
    mapped: Tensor,  # [D] int64, frames to decode maps of
) -> VGGTPrediction:
    """What all three heads say."""
    height, width = images.shape[-2:]
    tokens = vggt.aggregator(images)
    poses = vggt.camera_head(tokens[-1])
    chosen = [layer.index_select(1, mapped) for layer in tokens[:NUM_LISTS]]
    special = vggt.aggregator.num_special_tokens
    depth, depth_confidence = vggt.depth_head(chosen, height, width, special)
    points, point_confidence = vggt.point_head(chosen, height, width, special)
    return VGGTPrediction(poses, depth, depth_confidence, points, point_confidence)


def prepare(vggt: VGGT, seed: int) -> None:
    """Starting values for a short training, where the model was never trained; else nothing.

    Beside the values named at the top of this file: the dense heads' convolutions keep the size of
    what they read (He 2015, arXiv 1502.01852). PyTorch's defaults shrink it a thousandfold over
    the decoder's layers, and the heads first learn one number for all images.
    """
    aggregator = vggt.aggregator
    if aggregator.camera_token.abs().max() > UNTRAINED:
        return
    encoder = aggregator.patch_embed
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: Tensor, std: float) -> None:
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for parameter in (
            *(aggregator.camera_token, aggregator.register_token),
            *(encoder.cls_token, encoder.register_tokens),
        ):
            fill(parameter, TOKEN_STD)
        fill(encoder.pos_embed, POSITION_STD)
        for name, parameter in aggregator.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(LAYER_SCALE)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(ATTENTION_GAIN)
        for name, parameter in vggt.camera_head.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(LAYER_SCALE)
        pose = vggt.camera_head.pose_branch.fc2.weight
        fill(pose, LAST_GAIN * pose.shape[1] ** -0.5)
        for head in (vggt.depth_head, vggt.point_head):
            for name, layer in head.named_modules():
                if isinstance(layer, nn.ConvTranspose2d):  # stride and kernel are one
                    fill(layer.weight, layer.in_channels**-0.5)
                elif isinstance(layer, nn.Conv2d):
                    inputs = layer.weight[0].numel()
                    # Those whose result a ReLU halves, or that are added to what they read.
                    gain = 2.0 if layer.kernel_size == (3, 3) else 1.0
                    gain = 0.5 if name.endswith("conv2") else gain
                    fill(layer.weight, (gain / inputs) ** 0.5)
            last = head.scratch.output_conv2[-1]
            assert isinstance(last, nn.Conv2d)
            last.weight.mul_(LAST_GAIN)


class VGGTObjective:
    """Trains the pipeline's VGGT on resident clips.

    Raises
    ------
    ValueError : no clips to train or to evaluate on, or clips of a size that VGGT does not take.
    """

    def __init__(
        self,
        pipeline: Gen3RPipeline,
        train: Clips,
        held_out: Clips,
        options: ResidentConfig,
    ) -> None:
        patch = pipeline.vggt.config.patch_size
        for split, clips in (("train", train), ("held-out", held_out)):
            if len(clips) == 0:
                raise ValueError(f"vggt: no {split} clips; render some with `prepare procedural`")
            if any(side % patch for side in clips.depth.shape[-2:]):
                raise ValueError(
                    f"vggt: {split} clips of {clips.depth.shape[-2]} x {clips.depth.shape[-1]} "
                    f"pixels; heights and widths must be multiples of {patch}"
                )
        self.vggt = pipeline.vggt
        self.module: nn.Module = pipeline.vggt
        self.components: dict[str, nn.Module] = {"vggt": pipeline.vggt}
        self.train, self.held_out = train, held_out
        self.losses = VGGTLossConfig()
        prepare(self.vggt, options.seed)
        self.vggt.requires_grad_(True)
        self.vggt.aggregator.patch_embed.mask_token.requires_grad_(False)  # not used

    def draw(self, generator: torch.Generator, count: int) -> Views:
        """Views of about `count` whole clips: see `draw_views`."""
        return draw_views(self.train, generator, count)

    def loss(self, batch: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of `vggt_loss` and its terms, in float32 whatever the module's dtype."""
        prediction = predict(self.vggt, batch.images, batch.mapped)
        return vggt_loss(prediction, batch.depth, batch.points, batch.pose, self.losses)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Errors on the held-out clips: see `VGGTMeter`."""
        meter = VGGTMeter()
        for views in held_out_views(self.held_out):
            meter.add(self.vggt, predict(self.vggt, views.images, views.mapped), views)
        return meter.result()

    def finish(self) -> None:
        """Nothing: VGGT has no statistics to measure."""
