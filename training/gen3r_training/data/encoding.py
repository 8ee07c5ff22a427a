"""What the frozen encoders make of clips and prompts: for the latent cache, and for live samples.

One function for both, so that a cached step and one that encodes have the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from gen3r.appearance_vae import AppearanceVAE
from gen3r.causal_video import Posterior
from gen3r.checkpoint import CheckpointError, inspect_place, load_component, load_tokenizer
from gen3r.encoders import tokenize_and_encode
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.stages import embed_views
from gen3r.vggt import VGGT
from gen3r_kernels import Backends
from gen3r_training.data.fingerprints import CLIP_MODULES
from gen3r_training.data.samples import CachedClip
from gen3r_training.diffusion import encode_joint, keep_given_frames

MASKED_TASKS = ("1view", "2view")  # allview's control video is the target itself


@dataclass(frozen=True)
class ClipEncoders:
    """The frozen modules that clips go through, on one device and in one dtype."""

    wan_vae: AppearanceVAE
    geo_adapter: GeometryAdapter
    vggt: VGGT
    clip_image_encoder: CLIPVisionModel


@dataclass(frozen=True)
class TextEncoder:
    """The frozen text encoder; `max_length` is the transformer's text_len."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int


@torch.no_grad()
def encode_clip(
    encoders: ClipEncoders,
    frames: Tensor,  # [1, F, 3, H, W] float32 in [0, 1]
    tasks: Sequence[str] = MASKED_TASKS,
    *,
    control_geometry: bool = False,
    tokens: bool = False,
) -> CachedClip:
    """Posteriors and CLIP features of one clip, on the device and in the dtype of the modules.

    Parameters
    ----------
    tasks : whose control videos are encoded beside the target.
    control_geometry : encode VGGT's tokens of the control videos too, as upstream trains.
    tokens : keep the target's token maps.

    Raises
    ------
    ValueError : an unknown task, or frames that a module does not take.
    """
    vae, adapter, vggt = encoders.wan_vae, encoders.geo_adapter, encoders.vggt
    target = encode_joint(vae, adapter, vggt, frames)
    appearance: dict[str, Posterior] = {}
    geometry: dict[str, Posterior] = {}
    for task in tasks:
        video = keep_given_frames(frames, [task])
        if task == "allview":
            continue
        if control_geometry:
            given = encode_joint(vae, adapter, vggt, video)
            appearance[task], geometry[task] = given.appearance, given.geometry
        else:
            appearance[task] = encode_appearance(vae, video)
    return CachedClip(
        target.appearance,
        target.geometry,
        appearance,
        geometry,
        embed_views(encoders.clip_image_encoder, frames[:, 0]),
        tokens=target.tokens if tokens else None,
    )


def encode_appearance(
    vae: AppearanceVAE,
    frames: Tensor,  # [B, F, 3, H, W] in [0, 1]
) -> Posterior:  # of [B, 16, f, h, w]
    """The appearance half of `gen3r_training.diffusion.encode_joint`."""
    return vae.encode((2 * frames - 1).transpose(1, 2).to(next(vae.parameters()).dtype))


@torch.no_grad()
def encode_prompt(encoder: TextEncoder, prompt: str) -> Tensor:  # [n, text_dim]
    """Text features without padding; one prompt at a time, since a batch changes the last bits."""
    (features,) = tokenize_and_encode(
        encoder.tokenizer, encoder.model, [prompt], encoder.max_length
    )
    return features


def load_clip_encoders(
    places: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    backends: Backends | None = None,
) -> ClipEncoders:
    """Load the four modules.

    Parameters
    ----------
    places : module name -> its folder, or its one weight file.

    Raises
    ------
    CheckpointError : every missing or misshapen tensor, in one message, before anything is loaded.
    """
    reports = [inspect_place(name, places[name]) for name in CLIP_MODULES]
    _refuse(reports)
    load = {r.name: load_component(r, dtype, device, backends or Backends()) for r in reports}
    return ClipEncoders(**cast(dict[str, Any], load))


def load_text_encoder(
    places: Mapping[str, Path],
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
    backends: Backends | None = None,
) -> TextEncoder:
    """Load the text encoder and its tokenizer. Arguments and errors as `load_clip_encoders`."""
    report = inspect_place("text_encoder", places["text_encoder"])
    _refuse([report])
    tokenizer = load_tokenizer(places["tokenizer"].parent)
    model = load_component(report, dtype, device, backends or Backends())
    return TextEncoder(cast(UMT5EncoderModel, model), tokenizer, max_length)


def _refuse(reports: Sequence[Any]) -> None:
    problems = [f"{report.name}: {problem}" for report in reports for problem in report.problems]
    if problems:
        raise CheckpointError(f"{len(problems)} problem(s)\n  " + "\n  ".join(problems))
