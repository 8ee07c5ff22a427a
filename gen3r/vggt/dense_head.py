"""VGGT's dense heads: depth and point maps from four token lists (DPT, arXiv 2103.13413).

17 TFLOP for 49 frames of 560 x 560, nearly all in the 3x3 convolutions of the decoder
(`dense_decoder`) and behind it. On a GPU every map is channels-last in memory, as tokens are anyway
and as the convolutions want it; the last layer computes the activations too (`dense_output`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.config import VGGTConfig
from gen3r.vggt.dense_decoder import Scratch
from gen3r.video_autoencoder import arranged, memory_format
from gen3r_kernels import (
    Backends,
    add_position,
    conv2d_add_relu,
    dense_output,
    layer_norm_modulate,
    resize_bilinear,
)

POSITION_GAIN = 0.1
POSITION_FREQUENCY = 100.0
CHUNK_GIB = 1.25  # of activations at once: 13 frames of 560 x 560 in bf16

PositionTables = tuple[Tensor, Tensor]  # by column [w, C / 2] and by row [h, C / 2], float32


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


def position_tables(
    grid: tuple[int, int], channels: int, aspect: float, device: torch.device
) -> PositionTables:
    """The weak sinusoidal position signal: half of the channels for x, half for y."""
    frequencies = channels // 4
    half = torch.arange(frequencies, device=device, dtype=torch.float64)
    omega = POSITION_FREQUENCY ** -(half / frequencies)

    def sines(coordinates: Tensor) -> Tensor:  # [N] to [N, channels / 2]
        angles = coordinates.double()[:, None] * omega
        return (POSITION_GAIN * torch.cat([angles.sin(), angles.cos()], dim=1)).float()

    across, down = plane_coordinates(*grid, aspect, device)
    return sines(across), sines(down)


def chunk_frames(
    frames: int, height: int, width: int, features: int, itemsize: int, budget_gib: float
) -> int:
    """Frames to decode at once, in chunks of nearly one size.

    At the peak a frame holds 5/8 of `features` numbers a pixel (measured at 560 x 560: 0.094 GiB).
    """
    frame = height * width * features * itemsize * 5 / 8
    most = max(1, int(budget_gib * 2**30 / frame))
    return -(-frames // -(-frames // most))


def arrange_convolutions(head: nn.Module, _: object = None) -> None:
    """Put the convolutions' weights into channels-last memory where the maps will be so."""
    assert isinstance(head, DenseHead)
    for parameter in head.parameters():
        parameter.data = arranged(parameter.data, head.backends)


class DenseHead(nn.Module):
    """Token lists to a value map and its confidence at image resolution.

    Parameters
    ----------
    channels : values per pixel (1 for depth, 3 for points); one more output is the confidence,
        1 + exp(raw).
    exponential : values are exp(raw) (depth), else `inverse_log` of it (points); in float32.

    Raises
    ------
    ValueError : widths that the position signal can not quarter (sine and cosine of x and y).
    """

    def __init__(
        self, config: VGGTConfig, channels: int, exponential: bool, backends: Backends
    ) -> None:
        super().__init__()
        if config.features % 8 or any(out % 4 for out in config.out_channels):
            raise ValueError(
                f"VGGT features {config.features} must be a multiple of 8 and out_channels "
                f"{config.out_channels} multiples of 4"
            )
        self.config = config
        self.exponential = exponential
        self.backends = backends
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
        self.register_load_state_dict_post_hook(arrange_convolutions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.bfloat16()` and the like go through."""
        module = super()._apply(fn, recurse)
        arrange_convolutions(self)
        return module

    def forward(
        self,
        tokens: Sequence[Tensor],  # the four intermediate layers first, each [B, S, P, 2 C]
        height: int,
        width: int,
        patch_start_idx: int = 5,
        frames_per_chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # values [B, S, H, W, channels], confidence [B, S, H, W], float32
        """Decode the maps, `frames_per_chunk` frames at a time; None: what `CHUNK_GIB` holds.

        Entries of `tokens` beyond the fourth (the camera head's layer) are ignored, and so are the
        first `patch_start_idx` tokens of a view: 0 for lists of patch tokens alone.

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
        sizes = (batch * views, height, width, self.config.features)
        step = frames_per_chunk or chunk_frames(*sizes, flat[0].element_size(), CHUNK_GIB)
        positions = self.positions((rows, columns), width / height, flat[0].device)
        chunks = [
            self.decode([t[i : i + step] for t in flat], (rows, columns), positions)
            for i in range(0, batch * views, step)
        ]
        values, confidence = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return values.unflatten(0, (batch, views)), confidence.unflatten(0, (batch, views))

    def decode(
        self,
        patches: Sequence[Tensor],  # 4 of [N, h * w, 2 C], any strides
        grid: tuple[int, int],  # h, w
        positions: Sequence[PositionTables],
    ) -> tuple[Tensor, Tensor]:  # values [N, H, W, channels], confidence [N, H, W], float32
        """`forward` of so many frames at once, with tables from `positions`."""
        values, confidence = self._decode(patches, grid, positions)
        return values if self.exponential else inverse_log(values), confidence

    def positions(
        self, grid: tuple[int, int], aspect: float, device: torch.device
    ) -> list[PositionTables]:
        """Tables of the four projections, then of the full-size map."""
        found = {
            channels: position_tables(grid, channels, aspect, device)
            for channels in set(self.config.out_channels)
        }
        patch, last = self.config.patch_size, self.config.features // 2
        full = position_tables((grid[0] * patch, grid[1] * patch), last, aspect, device)
        return [*(found[channels] for channels in self.config.out_channels), full]

    def _decode(
        self,
        patches: Sequence[Tensor],  # 4 of [N, h * w, 2 C], any strides
        grid: tuple[int, int],
        positions: Sequence[PositionTables],
    ) -> tuple[Tensor, Tensor]:  # [N, H, W, channels], [N, H, W] float32
        levels = [
            resize(self._project(x, project, grid, position))
            for x, project, resize, position in zip(
                patches, self.projects, self.resize_layers, positions[:4], strict=True
            )
        ]
        patch, backends = self.config.patch_size, self.backends
        # A constant passes through a resize: the bias is added with the position signal.
        bias = self.scratch.output_conv1.bias
        assert bias is not None
        across, down = (
            table + half.to(table) for table, half in zip(positions[4], bias.chunk(2), strict=True)
        )
        x = resize_bilinear(
            self.scratch.fuse(levels, backends),
            (grid[0] * patch, grid[1] * patch),
            position=(across, down),
            backends=backends,
        )
        hidden, _, last = self.scratch.output_conv2
        assert isinstance(hidden, nn.Conv2d) and isinstance(last, nn.Conv2d)
        assert last.bias is not None
        x = conv2d_add_relu(x, hidden.weight, hidden.bias, relu=True, backends=backends)
        return dense_output(
            x, last.weight.flatten(1), last.bias, exponential=self.exponential, backends=backends
        )

    def _project(
        self, x: Tensor, project: nn.Module, grid: tuple[int, int], position: PositionTables
    ) -> Tensor:
        """Tokens [N, h * w, 2 C] to a map [N, C_i, h, w] with positions added."""
        assert isinstance(project, nn.Conv2d)
        normed = layer_norm_modulate(
            x,
            weight=self.norm.weight,
            bias=self.norm.bias,
            eps=self.norm.eps,
            out_dtype=x.dtype,
            backends=self.backends,
        )
        assert isinstance(normed, Tensor)
        rows = F.linear(normed, project.weight.flatten(1), project.bias).unflatten(1, grid)
        plane = add_position(rows.permute(0, 3, 1, 2), position)
        # Where no kernels run (on a CPU) the library is faster on channels-first memory.
        return plane if memory_format(plane, self.backends) is not None else plane.contiguous()
