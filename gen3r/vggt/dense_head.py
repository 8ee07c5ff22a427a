"""VGGT's dense heads: depth and point maps from four token lists (DPT, arXiv 2103.13413)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.config import VGGTConfig

LAST_FEATURES = 32
POSITION_GAIN = 0.1
POSITION_FREQUENCY = 100.0
FRAMES_PER_CHUNK = 8  # at 560 x 560 a frame needs about 80 MB per full-size bf16 feature map


def inverse_log(x: Tensor) -> Tensor:
    """sign(x) * (exp(|x|) - 1): the point head's activation."""
    return torch.sign(x) * torch.expm1(x.abs())


def plane_coordinates(
    rows: int, columns: int, aspect: float, device: torch.device
) -> tuple[Tensor, Tensor]:  # x [columns] and y [rows], float32
    """Cell centres on a plane of the given aspect (width / height) and half diagonal 1."""
    diagonal = (aspect**2 + 1) ** 0.5

    def axis(count: int, extent: float) -> Tensor:
        edge = extent / diagonal * (count - 1) / count
        return torch.linspace(-edge, edge, count, device=device, dtype=torch.float32)

    return axis(columns, aspect), axis(rows, 1.0)


def _sines(coordinates: Tensor, channels: int) -> Tensor:  # [N] to [channels, N] float32
    half = torch.arange(channels // 2, device=coordinates.device, dtype=torch.float64)
    omega = POSITION_FREQUENCY ** -(half / (channels / 2))
    angles = omega[:, None] * coordinates.double()
    return torch.cat([angles.sin(), angles.cos()]).float()


def add_position(
    x: Tensor,  # [N, C, h, w]
    aspect: float,
) -> Tensor:  # [N, C, h, w], dtype of x
    """Add the weak sinusoidal position signal: half of the channels for x, half for y."""
    channels, rows, columns = x.shape[1:]
    across, down = plane_coordinates(rows, columns, aspect, x.device)
    horizontal = _sines(across, channels // 2)[:, None, :].expand(-1, rows, -1)
    vertical = _sines(down, channels // 2)[:, :, None].expand(-1, -1, columns)
    return x + (POSITION_GAIN * torch.cat([horizontal, vertical])).to(x.dtype)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:  # [N, C, h, w] to [N, C, *size]
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """conv(relu(conv(relu(x)))) + relu(x).

    The skip carries relu(x), not x: upstream's first ReLU works in place (behaviour 1).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, h, w] to [N, C, h, w]
        x = F.relu(x)
        return self.conv2(F.relu(self.conv1(x))) + x


class Fusion(nn.Module):
    """Join a coarse map with the features of the next finer level, then enlarge.

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
        x: Tensor,  # [N, C, h, w]
        skip: Tensor | None,  # [N, C, h, w]
        size: tuple[int, int],
    ) -> Tensor:  # [N, C, *size]
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


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
        levels: Sequence[Tensor],  # 4 of [N, C_i, h_i, w_i], finest first
    ) -> Tensor:  # [N, features / 2, 2 h_0, 2 w_0]
        one, two, three, four = (
            rn(level)
            for rn, level in zip(
                (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn),
                levels,
                strict=True,
            )
        )
        x = self.refinenet4(four, None, three.shape[-2:])
        x = self.refinenet3(x, three, two.shape[-2:])
        x = self.refinenet2(x, two, one.shape[-2:])
        x = self.refinenet1(x, one, (2 * one.shape[-2], 2 * one.shape[-1]))
        return self.output_conv1(x)


class DenseHead(nn.Module):
    """Token lists to a value map and its confidence at image resolution.

    Parameters
    ----------
    channels : values per pixel (1 for depth, 3 for points); one more output is the confidence.
    activation : applied to the values in float32 (`torch.exp` for depth, `inverse_log` for points);
        the confidence is 1 + exp(raw).

    Raises
    ------
    ValueError : widths that the position signal can not quarter (sine and cosine of x and y).
    """

    def __init__(
        self, config: VGGTConfig, channels: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        if config.features % 8 or any(out % 4 for out in config.out_channels):
            raise ValueError(
                f"VGGT features {config.features} must be a multiple of 8 and out_channels "
                f"{config.out_channels} multiples of 4"
            )
        self.config = config
        self.activation = activation
        width = 2 * config.embed_dim
        first, second, _, fourth = outs = config.out_channels
        self.norm = nn.LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, out, 1) for out in outs)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(config, channels + 1)

    def forward(
        self,
        tokens: Sequence[Tensor],  # the four intermediate layers first, each [B, S, P, 2 C]
        height: int,
        width: int,
        patch_start_idx: int = 5,
        frames_per_chunk: int = FRAMES_PER_CHUNK,
    ) -> tuple[Tensor, Tensor]:  # values [B, S, H, W, channels], confidence [B, S, H, W], float32
        """Decode the maps, `frames_per_chunk` frames at a time to bound memory.

        Entries of `tokens` beyond the fourth (the camera head's layer) are ignored.

        Raises
        ------
        ValueError : fewer than four lists, or a token count that does not fit height and width.
        """
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        if len(tokens) < 4 or tokens[0].shape[2] != patch_start_idx + rows * columns:
            raise ValueError(
                f"VGGT dense head: {len(tokens)} lists {list(tokens[0].shape) if tokens else []} "
                f"do not fit {height} x {width}; expected 4 lists with "
                f"{patch_start_idx} + {rows} * {columns} tokens"
            )
        batch, views = tokens[0].shape[:2]
        flat = [t.flatten(0, 1)[:, patch_start_idx:] for t in tokens[:4]]
        step = max(1, frames_per_chunk)
        chunks = [
            self._decode([t[i : i + step] for t in flat], height, width)
            for i in range(0, batch * views, step)
        ]
        raw = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        raw = raw.unflatten(0, (batch, views))
        return self.activation(raw[..., :-1]), 1 + raw[..., -1].exp()

    def _decode(self, patches: list[Tensor], height: int, width: int) -> Tensor:
        """Four [N, h * w, 2 C] lists to raw outputs [N, H, W, channels + 1] float32."""
        patch, aspect = self.config.patch_size, width / height
        grid = (height // patch, width // patch)
        levels = []
        for x, project, resize in zip(patches, self.projects, self.resize_layers, strict=True):
            plane = self.norm(x).transpose(1, 2).unflatten(2, grid)
            levels.append(resize(add_position(project(plane), aspect)))
        x = _resize(self.scratch.fuse(levels), (grid[0] * patch, grid[1] * patch))
        x = self.scratch.output_conv2(add_position(x, aspect))
        return x.permute(0, 2, 3, 1).float()
