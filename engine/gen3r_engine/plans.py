"""Which exported plans of a folder an engine uses, and why not the others.

At load every entry of plans.json is matched: to the model (hash of the component's weights), the
device, the GPU and the libraries that it was built with, the presets; what fits is opened, its
files verified. An entry's precision is the choice of whoever gave the folder: where several fit,
the fastest format comes first, of that the model's own dtype, then the most exact one.

For a request, `EnginePlans.choose` says which parts of it run from plans. Parts for whose shape
there is none run as without plans, and that is told before the request begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gen3r_engine.plan_matching import Finder, Host, Shape
from gen3r_engine.planned import (
    Chunks,
    Clip,
    OpenPlan,
    PlannedImageEncoder,
    PlannedSteps,
    PlannedTextEncoder,
)
from gen3r_export.manifest import Entry
from gen3r_export.runtime import Plans

FORMATS = {"cuda": ("tensorrt", "aoti", "onnx"), "cpu": ("aoti", "onnx")}  # fastest first
OWN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
EXACT_FIRST = ("fp32", "bf16", "fp16", "fp8")
SIZELESS = ("text_encoder", "image_encoder")  # their graphs do not depend on the scene's size


@dataclass(frozen=True)
class Chosen:
    """The plans of a request's parts; None: the part runs as without plans.

    used : what every planned part runs from. without : why a part with plans does not use them.
    """

    text_encoder: PlannedTextEncoder | None = None
    image_encoder: PlannedImageEncoder | None = None
    vae_encoder: Clip | Chunks | None = None
    vae_decoder: Clip | Chunks | None = None
    adapter_decoder: Clip | Chunks | None = None
    camera_head: OpenPlan | None = None
    depth_head: OpenPlan | None = None
    point_head: OpenPlan | None = None
    denoiser: PlannedSteps | None = None
    used: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, dict[str, str]]:
        """For `Scene.info`."""
        return {"used": dict(self.used), "without": dict(self.without)}


class EnginePlans:
    """The plans of a folder that fit an engine.

    Attributes
    ----------
    report : one line per entry: used, or refused with the reason. notes : lines about requests.
    tell : called with each new line of `notes`.
    gib : memory that the open plans take on the GPU: weights, and what TensorRT holds beside them.

    Raises
    ------
    ValueError : no plans.json in the folder, or a broken one.
    """

    def __init__(self, folder: str | Path, host: Host) -> None:
        self.folder, self.host = Path(folder), host
        self.report: list[str] = []
        self.notes: list[str] = []
        self.tell: Callable[[str], None] | None = None
        self._open: list[OpenPlan] = []
        self._chosen: dict[Shape, Chosen] = {}
        self._told: set[Shape] = set()
        self._match(Plans(folder))
        held = sum(p.entry.bytes + getattr(p.runner, "memory", 0) for p in self._open)
        self.gib = held / 2**30 if host.device.type == "cuda" else 0.0

    def __len__(self) -> int:
        """How many plans are open."""
        return len(self._open)

    def _match(self, plans: Plans) -> None:
        """Open the best entry of every graph and shape; a line for each entry."""
        taken: dict[tuple[object, ...], OpenPlan] = {}
        for entry in sorted(plans.entries, key=self._rank):
            shape = (entry.height, entry.width, entry.frames)
            key = (entry.name, entry.form, entry.batch, *(() if entry.part in SIZELESS else shape))
            reason = self.host.refuses(entry)
            if reason is None and key in taken:
                reason = f"not needed beside {taken[key].entry}"
            if reason is None:
                try:
                    runner = plans.open(entry, str(self.host.device), verify=True)
                except ValueError as error:
                    reason = str(error)
                else:
                    taken[key] = OpenPlan(entry, runner)
            self.report.append(f"{entry}: " + ("used" if reason is None else f"refused: {reason}"))
        self._open = list(taken.values())

    def _rank(self, entry: Entry) -> tuple[int, int]:
        formats = FORMATS[self.host.device.type]
        own = OWN[str(self.host.dtype).removeprefix("torch.")]
        precisions = (own, *(p for p in EXACT_FIRST if p != own))
        return _index(formats, entry.format), _index(precisions, entry.precision)

    @property
    def folders(self) -> list[str]:
        """Of the open plans: names that tell their content."""
        return sorted(plan.entry.folder for plan in self._open)

    @property
    def text_identity(self) -> str:
        """What text features depend on beside the checkpoint: "" where no plan encodes texts."""
        try:
            # A scene's shape does not matter to it.
            encoder = Finder(self._open, self.host, (1, 56, 56, 1, True)).text_encoder()
        except ValueError:
            return ""
        return encoder.plan.entry.folder

    # --------------------------------------------------------------------------------- of a request

    def choose(self, frames: int, height: int, width: int, batch: int, guided: bool) -> Chosen:
        """The plans for scenes of this shape, `batch` of them in one denoising step."""
        shape = (frames, height, width, batch, guided)
        if shape not in self._chosen:
            self._chosen[shape] = self._choose(shape)
        return self._chosen[shape]

    def announce(self, frames: int, height: int, width: int, batch: int, guided: bool) -> None:
        """Tell, once a shape, in `notes` and to `tell`, which parts no plan takes the shape of."""
        shape = (frames, height, width, batch, guided)
        if shape in self._told:
            return
        self._told.add(shape)
        for part, reason in self.choose(*shape).without.items():
            line = (
                f"{frames} frames of {height} x {width}, {batch} at once: {part} runs without "
                f"its plan: {reason}"
            )
            self.notes.append(line)
            if self.tell is not None:
                self.tell(line)

    def _choose(self, shape: Shape) -> Chosen:
        found = Finder(self._open, self.host, shape)
        makers = {
            "text_encoder": found.text_encoder,
            "image_encoder": found.image_encoder,
            "vae_encoder": found.vae_encoder,
            "vae_decoder": found.vae_decoder,
            "adapter_decoder": found.adapter_decoder,
            "camera_head": found.camera_head,
            "depth_head": found.depth_head,
            "point_head": found.point_head,
            "denoiser": found.denoiser,
        }
        parts, used, without = {}, {}, {}
        for part in {plan.entry.part: None for plan in self._open}:
            try:
                parts[part] = makers[part]()
            except ValueError as error:
                without[part] = str(error)
            else:
                used[part] = str(getattr(parts[part], "plan", parts[part]))
        return Chosen(**parts, used=used, without=without)  # type: ignore[arg-type]


def _index(order: tuple[str, ...], name: str) -> int:
    return order.index(name) if name in order else len(order)
