"""Exported plans in the place of the model's modules: what the stages call, run from files.

Each class here answers to what `gen3r.stages` asks of the module that it stands for, takes and
gives tensors in the model's dtype, and holds nothing but open files. Which of them a request gets
is decided in `gen3r_engine.plans`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.causal_video import Posterior
from gen3r.encoders import preprocess_clip, to_uint8
from gen3r.transformer import RawConditions, pad_text
from gen3r_export.graph import DTYPES
from gen3r_export.manifest import Entry
from gen3r_export.runtime import Runner

Velocity = Callable[[Tensor, Tensor], Tensor]  # latents, tables of one step -> [R, 16, f, h, 2 w]


class PlanError(ValueError):
    """A plan that fails while it runs."""


@dataclass(frozen=True, eq=False)
class OpenPlan:
    """An entry of plans.json with its open file."""

    entry: Entry
    runner: Runner

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of inputs that are cast to the dtypes of the graph.

        Raises
        ------
        PlanError : the runner fails; memory that torch has not is its own error.
        """
        try:
            wanted = [DTYPES[spec.dtype] for spec in self.entry.inputs]
            given = (x.to(dtype) for x, dtype in zip(inputs, wanted, strict=True))
            return self.runner(*given)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise PlanError(
                f"the plan {self.entry} fails: {reason}; export it again, or leave it out"
            ) from error

    def __str__(self) -> str:
        return f"{self.entry.format} {self.entry.precision}"


@dataclass(frozen=True, eq=False)
class Clip:
    """A whole clip in one run: decodes latents, or encodes frames to mean and log variance."""

    plan: OpenPlan

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.plan(x)

    def __str__(self) -> str:
        return str(self.plan)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The first frame, then chunks of so many latent frames, each with the cache of the one before.

    results : outputs before the cache. unit : frames of x that a latent frame stands for.
    """

    first: OpenPlan
    following: OpenPlan | None
    sizes: tuple[int, ...]
    results: int
    unit: int

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.first(x[:, :, :1])
        pieces, start = [out[: self.results]], 1
        for size in self.sizes:
            assert self.following is not None  # there are sizes only with it
            stop = start + size * self.unit
            out = self.following(x[:, :, start:stop], *out[self.results :])
            pieces.append(out[: self.results])
            start = stop
        return tuple(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))

    def __str__(self) -> str:
        return f"{self.first}, in {1 + len(self.sizes)} chunks"


class PlannedAutoencoder:
    """A `VideoAutoencoder` of which one direction, or both, are plans; all else is the module's."""

    def __init__(
        self, module: Any, encode: Clip | Chunks | None = None, decode: Clip | Chunks | None = None
    ) -> None:
        self._module, self._encode, self._decode = module, encode, decode

    def encode(
        self,
        x: Tensor,  # [1, C, F, H, W]
        working_gib: float = 0.0,  # the plan has its own
    ) -> Posterior:
        """As `VideoAutoencoder.encode`."""
        if self._encode is None:
            found: Posterior = self._module.encode(x, working_gib)
            return found
        frames = 1 + (x.shape[2] - 1) // self._module.temporal_factor * self._module.temporal_factor
        mean, logvar = self._encode(x[:, :, :frames])
        return Posterior(mean.to(x.dtype), logvar.to(x.dtype))

    def decode(
        self,
        latents: Tensor,  # [1, z, f, h, w]
        working_gib: float = 0.0,  # the plan has its own
    ) -> Tensor:  # [1, C, F, H, W]
        """As `VideoAutoencoder.decode`."""
        if self._decode is None:
            found: Tensor = self._module.decode(latents, working_gib)
            return found
        return self._decode(latents)[0].to(latents.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class PlannedHeads:
    """VGGT as `stages.read_heads` uses it, with the heads that are plans."""

    def __init__(
        self,
        module: Any,
        camera: OpenPlan | None = None,
        depth: OpenPlan | None = None,
        point: OpenPlan | None = None,
    ) -> None:
        self._module = module
        for name, plan, run in (
            ("camera_head", camera, _cameras),
            ("depth_head", depth, _dense),
            ("point_head", point, _dense),
        ):
            setattr(self, name, getattr(module, name) if plan is None else run(plan))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _cameras(plan: OpenPlan) -> Callable[[Tensor], list[Tensor]]:
    """As `CameraHead`; only the last iteration's encoding."""
    return lambda tokens: list(plan(tokens[:, :, 0]))


def _dense(plan: OpenPlan) -> Callable[..., tuple[Tensor, Tensor]]:
    """As `DenseHead` over lists of patch tokens alone."""

    def run(
        tokens: Sequence[Tensor], height: int, width: int, patch_start_idx: int = 0
    ) -> tuple[Tensor, Tensor]:
        values, confidence = plan(*(layer[:, :, patch_start_idx:] for layer in tokens[:4]))
        return values, confidence

    return run


class PlannedTextEncoder:
    """The text encoder as `tokenize_and_encode` uses it: texts are padded to what the plan takes.

    Padding is masked out, and position biases are relative: features of the tokens stay the same.
    """

    def __init__(
        self,
        plan: OpenPlan,
        least: int,  # tokens; shorter texts are padded
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.plan, self.least, self.dtype = plan, least, dtype
        self.shared = SimpleNamespace(weight=SimpleNamespace(device=device))  # where ids go

    def __call__(
        self,
        *,
        input_ids: Tensor,  # [B, n] int64
        attention_mask: Tensor,  # [B, n]
    ) -> SimpleNamespace:  # last_hidden_state: [B, n, C]
        """As `UMT5EncoderModel`."""
        count = input_ids.shape[1]
        extra = (0, max(0, self.least - count))
        (features,) = self.plan(F.pad(input_ids, extra), F.pad(attention_mask, extra))
        return SimpleNamespace(last_hidden_state=features[:, :count].to(self.dtype))


class PlannedImageEncoder:
    """The image encoder as `stages.embed_views` runs it."""

    def __init__(self, plan: OpenPlan, image_size: int, dtype: torch.dtype) -> None:
        self.plan, self.image_size, self.dtype = plan, image_size, dtype

    def embed(
        self,
        first_views: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:  # [B, 1 + patches, C]
        """Features, a view at a time: plans of one view serve every batch."""
        pixels = preprocess_clip(to_uint8(first_views), self.image_size)
        return torch.cat([self.plan(one[None])[0] for one in pixels]).to(self.dtype)


class PlannedSteps:
    """The transformer as `Denoiser` uses it: what is constant over the steps, and the velocity."""

    def __init__(self, prepare: OpenPlan, step: OpenPlan, text_len: int) -> None:
        self.prepare, self.step, self.text_len = prepare, step, text_len

    def begin(
        self,
        conditions: RawConditions,  # of 2 B rows
        timesteps: Tensor,  # [T] float32
    ) -> tuple[Tensor, Velocity]:  # tables [T, 6 L + 2, D] float32, and the velocity of a step
        """Run ``prepare``; the velocity reads what it gave."""
        text = pad_text(conditions.text, self.text_len)
        # Two steps at least: an axis of one is not dynamic.
        times = F.pad(timesteps, (0, max(0, 2 - len(timesteps))))
        cameras = conditions.cameras
        if cameras is None:
            raise ValueError(
                "the denoiser's plan takes camera maps; give zeros where there are none"
            )
        embedding, tables, *kept = self.prepare(
            text, conditions.image, conditions.control, cameras, times
        )
        if len(self.step.entry.inputs) > 2 + 1 + len(kept):
            lengths = [min(len(one), self.text_len) for one in conditions.text]
            kept.append(torch.tensor(lengths, dtype=torch.int32, device=text.device))

        def velocity(latents: Tensor, table: Tensor) -> Tensor:
            return self.step(latents, table, embedding, *kept)[0]

        return tables[: len(timesteps)], velocity

    def __str__(self) -> str:
        return str(self.step)
