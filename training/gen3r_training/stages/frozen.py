"""The frozen modules of stage 2: loaded when something is to be encoded, and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from gen3r.checkpoint import ComponentReport, load_component
from gen3r_kernels import Backends
from gen3r_training.data import CachedClip, LatentCache, Sample
from gen3r_training.data.encoding import ClipEncoders, TextEncoder, encode_clip, encode_prompt
from gen3r_training.data.fingerprints import CLIP_MODULES

PROMPTS_KEPT = 2048  # features on the host, at most 4 MB each in bf16


class Frozen:
    """Encoders of clips and prompts on one device; with a full latent cache none is ever loaded."""

    def __init__(
        self,
        reports: Mapping[str, ComponentReport],
        tokenizer: PreTrainedTokenizerBase,
        text_len: int,
        device: torch.device,
        dtype: torch.dtype,
        backends: Backends,
        cache: LatentCache | None = None,
    ) -> None:
        self._reports, self._tokenizer, self._text_len = reports, tokenizer, text_len
        self.device, self.dtype, self._backends, self._cache = device, dtype, backends, cache
        self._features = lru_cache(PROMPTS_KEPT)(self._encode_prompt)

    @cached_property
    def clips(self) -> ClipEncoders:
        """The four modules that clips go through."""
        modules: dict[str, Any] = {name: self._load(name) for name in CLIP_MODULES}
        return ClipEncoders(**modules)

    @cached_property
    def _texts(self) -> TextEncoder:
        model = cast(UMT5EncoderModel, self._load("text_encoder"))
        return TextEncoder(model=model, tokenizer=self._tokenizer, max_length=self._text_len)

    def load(self) -> None:
        """Load everything now, where no cache stands for it."""
        if self._cache is None:
            _ = self.clips, self._texts

    def release(self) -> None:
        """Forget the modules that clips go through, where a cache stands for them."""
        if self._cache is not None:
            self.__dict__.pop("clips", None)

    @torch.no_grad()
    def clip(
        self, sample: Sample, tasks: Sequence[str], control_geometry: bool = False
    ) -> CachedClip:
        """The encoded clip of a sample with the control videos of `tasks`, on the device."""
        if sample.cached is not None:
            return sample.cached.to(self.device)
        frames = sample.frames[None].to(self.device)
        return encode_clip(self.clips, frames, tasks, control_geometry=control_geometry)

    def text(self, prompt: str) -> Tensor:  # [n, text_dim] on the device
        """Features of a prompt; each is computed once."""
        return self._features(prompt).to(self.device)

    def _encode_prompt(self, prompt: str) -> Tensor:  # on the host
        if self._cache is not None:
            cached = self._cache.text(prompt)
            if cached is not None:
                return cached
        return encode_prompt(self._texts, prompt).cpu()

    def _load(self, name: str) -> torch.nn.Module:
        return load_component(self._reports[name], self.dtype, self.device, self._backends)
