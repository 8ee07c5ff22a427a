"""EngineConfig: everything that a person may decide about the runtime, checked when it is made.

What the numbers of a scene depend on is `preset`, `dtype`, `encoder_precision` and `attention`; the
rest is about time and memory. `presets.resolve` turns the words into what this GPU does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from gen3r.config import ENCODER_PRECISIONS

PRESETS = ("exact", "fp8")
TIERS = ("resident", "24gb", "12gb")  # most GPU memory first
PROMPT_CACHES = ("memory", "disk", "off")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model.

    Parameters
    ----------
    preset : ``exact`` (upstream's mathematics) or ``fp8`` (8-bit products in the transformer).
    residency : ``resident``, ``24gb`` or ``12gb`` (see `residency`), or ``auto``: the first of them
        that fits the free memory.
    max_memory_gib : GiB of GPU memory that this process may take; None: all that is free.
    attention : a name of ``gen3r_kernels.backends.ATTENTION_BACKENDS``, or ``auto``.
    max_batch : most scenes in one denoising step.
    compiled : the denoising step goes through torch.compile (on a GPU).
    captured : the denoising step is a CUDA graph (on a GPU).
    cache_dir : folder of compiled code and prompt features; None: `caches.default_folder()`.
    prompt_cache : where text features are kept: ``memory``, ``disk`` (and memory) or ``off``.
    retry_on_oom : after running out of memory, try once more with half the batch.
    overlap : encoding, decoding and writing of other scenes run beside the denoising of one.
    device : ``auto`` (the first GPU, or the CPU without one), ``cpu``, ``cuda`` or ``cuda:1``.
    dtype : ``bfloat16`` or ``float32``; None: bfloat16 on a GPU, float32 on a CPU.
    encoder_precision : of the views' video autoencoder: ``model`` (as `dtype`, like upstream) or a
        more exact one, ``mixed``, ``tf32`` or ``float32`` (`AppearanceVAE.set_encoder_precision`).
    allow_pickle : load .pth files too (weights only).
    plans : folder of exported plans, of which those that fit are run (`gen3r_engine.plans`).

    Raises
    ------
    ValueError : a value outside its choices or limits.
    """

    preset: str = "exact"
    residency: str = "auto"
    max_memory_gib: float | None = None
    attention: str = "auto"
    max_batch: int = 1
    compiled: bool = True
    captured: bool = True
    cache_dir: Path | None = None
    prompt_cache: str = "memory"
    retry_on_oom: bool = False
    overlap: bool = True
    device: str = "auto"
    dtype: str | None = None
    encoder_precision: str = "model"
    allow_pickle: bool = False
    plans: Path | None = None

    def __post_init__(self) -> None:
        _choice("preset", self.preset, PRESETS)
        _choice("residency", self.residency, ("auto", *TIERS))
        _choice("prompt_cache", self.prompt_cache, PROMPT_CACHES)
        _choice("encoder_precision", self.encoder_precision, ENCODER_PRECISIONS)
        if self.dtype is not None:
            _choice("dtype", self.dtype, DTYPES)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; use True or False")
        self._check_numbers()
        self._check_device()
        self._check_attention()
        for name in ("cache_dir", "plans"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)).expanduser())

    def _check_numbers(self) -> None:
        batch = self.max_batch
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"max_batch is {batch!r}; use a whole number, 1 or more")
        limit = self.max_memory_gib
        if limit is None:
            return
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not number or not math.isfinite(limit) or limit <= 0:
            raise ValueError(
                f"max_memory_gib is {limit!r}; use GiB above 0, or None for all that is free"
            )

    def _check_device(self) -> None:
        name, _, index = self.device.partition(":")
        if self.device in ("auto", "cpu", "cuda") or (name == "cuda" and index.isdecimal()):
            return
        raise ValueError(f"device '{self.device}' is not supported; use auto, cpu, cuda or cuda:1")

    def _check_attention(self) -> None:
        # Imported here: it needs torch, which a command's help shall not wait for.
        from gen3r_kernels.backends import Backends

        Backends(attention=self.attention)


def as_config(config: EngineConfig | str) -> EngineConfig:
    """The config itself, or the defaults with a preset's name. ValueError for an unknown name."""
    return EngineConfig(preset=config) if isinstance(config, str) else config


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown; known: {', '.join(known)}")
