"""ExportConfig: everything that a person may decide about an export, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gen3r_export.graph import DimRange

FORMATS = ("onnx", "tensorrt", "aoti")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float16"}
FORMS = ("auto", "clip", "chunk", "both")
SIDE = 56  # pixels: 8 per latent and 14 per token both divide multiples of it
OPSETS = (18, 23)
BF16_OPSET = 22  # the first with convolutions in bfloat16
FP8_OPSET = 19  # the first with floats of 8 bits in Q/DQ nodes
OPSET = 20
CAPABILITY = re.compile(r"\d{2,3}")


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Parameters
    ----------
    parts : names of `gen3r_export.parts.PARTS`; empty: all.
    format : ``onnx``, ``tensorrt`` or ``aoti``.
    precision : of weights and activations, ``fp32``, ``fp16``, ``bf16``; ``fp8``: products of 8
        bits inside a graph of fp16 (formats onnx and tensorrt).
    height, width : pixels, multiples of 56; None: the model's own.
    frames : video frames (4 k + 1): one number, or least and most for a dynamic axis; None: the
        model's own.
    batch : scenes: least and most; equal for a static axis.
    form : of the video autoencoders: ``clip`` (a whole clip at a time), ``chunk`` (two graphs with
        the cache as inputs and outputs) or ``both``; ``auto``: both.
    out : folder that gets the files and plans.json.
    run : whether what was exported is run here and compared with PyTorch.
    opset : of ONNX, 18 to 23; None: 20, for bf16 22.
    capabilities : compute capabilities that TensorRT-RTX builds for ("89"); empty: the GPU here,
        and without one 80, 86, 89 and 120.
    workspace_gib : memory that TensorRT's builder may take for tactics; None: its own default.
    refit : build plans whose weights can be replaced.
    timing_cache : file that keeps TensorRT's timings between builds (made where it is missing).
    device : where AOTInductor packages run: ``cpu`` or ``cuda``.
    working_gib : memory for the activations of a whole clip's autoencoder (sets its chunks).

    Raises
    ------
    ValueError : a value outside its choices or limits.
    """

    parts: tuple[str, ...] = ()
    format: str = "onnx"
    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    frames: tuple[int, int] | None = None
    batch: tuple[int, int] = (1, 1)
    form: str = "auto"
    out: Path = field(default_factory=lambda: Path("plans"))
    run: bool = True
    opset: int | None = None
    capabilities: tuple[str, ...] = ()
    workspace_gib: float | None = None
    refit: bool = False
    timing_cache: Path | None = None
    device: str = "cpu"
    working_gib: float = 4.5

    def __post_init__(self) -> None:
        _choice("format", self.format, FORMATS)
        _choice("precision", self.precision, tuple(PRECISIONS))
        _choice("form", self.form, FORMS)
        _choice("device", self.device, ("cpu", "cuda"))
        if self.precision == "fp8" and self.format == "aoti":
            raise ValueError(
                "precision 'fp8' is made of Q/DQ nodes, which AOTInductor packages do not have; "
                "use bf16, or format onnx or tensorrt"
            )
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % SIDE):
                near = max(1, round(value / SIDE)) * SIDE
                raise ValueError(f"{name} {value} is not a multiple of {SIDE}; use {near}")
        self._check_ranges()
        for capability in self.capabilities:
            if not CAPABILITY.fullmatch(capability):
                raise ValueError(
                    f"compute capability '{capability}' is not a number such as 89 or 120"
                )
        for name in ("workspace_gib", "working_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; use GiB above 0")
        low, high = OPSETS
        if self.opset is not None and not low <= self.opset <= high:
            raise ValueError(f"opset {self.opset} is not supported; use {low} to {high}")
        if self.precision == "bf16" and self.onnx_opset < BF16_OPSET:
            raise ValueError(
                f"opset {self.opset} has no convolutions in bf16; use {BF16_OPSET} or 23"
            )
        if self.precision == "fp8" and self.onnx_opset < FP8_OPSET:
            raise ValueError(
                f"opset {self.opset} has no floats of 8 bits; use {FP8_OPSET} to {high}"
            )

    def _check_ranges(self) -> None:
        for name in ("batch", "frames"):
            value = getattr(self, name)
            if value is None:
                continue
            least, most = value
            if not 1 <= least <= most:
                raise ValueError(f"{name} {least}:{most} must be 1 or more and must not fall")
            for count in value if name == "frames" else ():
                if count % 4 != 1:
                    near = 4 * ((count - 1) // 4) + 1
                    raise ValueError(f"frames {count} is not 4 k + 1; use {near} or {near + 4}")

    @property
    def onnx_opset(self) -> int:
        """The opset asked for, or the default of the precision."""
        if self.opset is not None:
            return self.opset
        return BF16_OPSET if self.precision == "bf16" else OPSET

    @property
    def dtype(self) -> str:
        """Of the graph's floating-point inputs, weights and outputs."""
        return PRECISIONS[self.precision]

    @property
    def batch_range(self) -> DimRange | None:
        """Lengths of the dynamic batch axis; None where it is static."""
        least, most = self.batch
        return None if least == most else DimRange(least, least, most)


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown; known: {', '.join(known)}")
