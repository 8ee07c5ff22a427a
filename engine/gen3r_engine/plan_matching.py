"""Which exported plans fit a model and a machine, and which of them a scene's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from gen3r.config import Gen3RConfig
from gen3r.stages import latent_shape
from gen3r_engine.planned import (
    Chunks,
    Clip,
    OpenPlan,
    PlannedImageEncoder,
    PlannedSteps,
    PlannedTextEncoder,
)
from gen3r_export.manifest import Entry
from gen3r_export.parts import COMPONENT
from gen3r_export.runtime import axis_lengths

PINNED = {"aoti": ("torch",), "tensorrt": ("tensorrt", "tensorrt-rtx")}  # versions that must agree
UNUSED = {"adapter_encoder": "the engine encodes no token maps; it is for programs of your own"}
GUIDED_ROWS = 2  # of conditions a scene
Shape = tuple[int, int, int, int, bool]  # frames, height, width, batch, guided


@dataclass(frozen=True)
class Host:
    """What plans are matched to.

    hashes : of the components' weights. gpu : the GPU's name, capability as "90"; None on a CPU.
    dtype : the model's. preset, encoder_precision : as `EngineConfig`.
    """

    hashes: Mapping[str, str]
    config: Gen3RConfig
    device: torch.device
    dtype: torch.dtype
    gpu: str | None = None
    capability: str | None = None
    preset: str = "exact"
    encoder_precision: str = "model"

    def refuses(self, entry: Entry) -> str | None:
        """Why an entry cannot be used here, with the mend; None: it fits."""
        checks = (self._other_use, self._other_model, self._other_device, self._other_version)
        return next((reason for check in checks if (reason := check(entry))), None)

    def _other_use(self, entry: Entry) -> str | None:
        if entry.part in UNUSED:
            return UNUSED[entry.part]
        if entry.part not in COMPONENT:
            return f"part '{entry.part}' is unknown to this version; export again with it"
        if entry.part == "denoiser" and self.preset not in ("exact", entry.precision):
            return (
                f"preset {self.preset} was asked, which the plan does not compute in; "
                "use preset exact, or leave the plan out"
            )
        if entry.part == "vae_encoder" and self.encoder_precision != "model":
            return (
                f"encoder precision {self.encoder_precision} was asked, which the plan does not "
                "compute in; use encoder precision model"
            )
        return None

    def _other_model(self, entry: Entry) -> str | None:
        mine = self.hashes.get(entry.component)
        if entry.weights != mine:
            return (
                f"it holds other weights ({entry.weights[:8]}, this model's {entry.component} is "
                f"{str(mine)[:8]}); export this checkpoint, or load the one that was exported"
            )
        return None

    def _other_device(self, entry: Entry) -> str | None:
        kind = self.device.type
        if entry.device not in ("any", kind):
            return f"it is for {entry.device}, the engine runs on {kind}; export it for {kind}"
        built = entry.gpu
        if built is not None and built.capability != self.capability:
            return (
                f"it was built for {built}, this GPU is sm_{self.capability} ({self.gpu}); "
                "export on this GPU"
            )
        if built is not None and built.name not in (None, self.gpu):
            return f"it was built for {built.name}, this GPU is {self.gpu}; export on this GPU"
        return None

    def _other_version(self, entry: Entry) -> str | None:
        for name in PINNED.get(entry.format, ()):
            built = entry.versions.get(name)
            if built is None:
                continue
            try:
                here = installed_version(name)
            except ValueError as error:
                return str(error)
            if here != (release(built) if name == "torch" else built):
                return f"it was built with {name} {built}, here is {here}; export it with {here}"
        return None


def installed_version(name: str) -> str:
    """Version of a library that plans are bound to. ValueError where it is not installed."""
    if name == "torch":
        return release(torch.__version__)
    from gen3r_export.tensorrt_library import find_library

    return find_library(name).version


def release(version: str) -> str:
    """``2.13`` of ``2.13.0+cu130``: packages of a release run in its later fixes."""
    return ".".join(version.split(".")[:2])


class Finder:
    """Finds the plan of each part for one shape; ValueError with the plans' shapes where none."""

    def __init__(self, plans: list[OpenPlan], host: Host, shape: Shape) -> None:
        self.plans, self.host, self.shape = plans, host, shape
        frames, height, width, *_ = shape
        channels = host.config.transformer.out_dim
        self.grid = latent_shape(frames, height, width, channels)
        self.latents = (1, channels, self.grid[1], height // 8, width // 8)
        self.video = (1, 3, frames, height, width)

    def _fitting(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> OpenPlan:
        """The first plan of a graph that takes these inputs."""
        return next(iter(self._all_fitting(name, shapes)))

    def _all_fitting(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[OpenPlan]:
        named = [plan for plan in self.plans if plan.entry.name == name]
        count = 0
        for plan in named:
            if self._takes(plan, shapes):
                count += 1
                yield plan
        if not count:
            listed = "; ".join(sorted({plan.entry.shape_text() for plan in named}))
            raise ValueError(f"it is for {listed}" if named else f"{name} is missing in the folder")

    @staticmethod
    def _takes(plan: OpenPlan, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        try:
            axis_lengths(plan.entry.inputs, plan.entry.dims, shapes)
        except ValueError:
            return False
        return True

    # -------------------------------------------------------------------------------------- parts

    def text_encoder(self) -> PlannedTextEncoder:
        longest = self.host.config.transformer.text_len
        plan = self._fitting("text_encoder", {"input_ids": (1, longest)})
        axis = plan.entry.inputs[0].shape[1]
        least = axis if isinstance(axis, int) else plan.entry.dims[axis].least
        return PlannedTextEncoder(plan, least, self.host.device, self.host.dtype)

    def image_encoder(self) -> PlannedImageEncoder:
        side = self.host.config.clip_image_encoder.image_size
        plan = self._fitting("image_encoder", {"pixels": (1, 3, side, side)})
        return PlannedImageEncoder(plan, side, self.host.dtype)

    def vae_encoder(self) -> Clip | Chunks:
        return self._codec("vae_encoder", "video", self.video, results=2, unit=4)

    def vae_decoder(self) -> Clip | Chunks:
        return self._codec("vae_decoder", "latents", self.latents, results=1, unit=1)

    def adapter_decoder(self) -> Clip | Chunks:
        return self._codec("adapter_decoder", "latents", self.latents, results=1, unit=1)

    def _codec(
        self, part: str, name: str, shape: tuple[int, ...], *, results: int, unit: int
    ) -> Clip | Chunks:
        """A plan of the whole clip, else two of its chunks."""
        if any(plan.entry.name == part for plan in self.plans):
            try:
                return Clip(self._fitting(part, {name: shape}))
            except ValueError:
                if not any(plan.entry.name == f"{part}_first" for plan in self.plans):
                    raise
        batch, channels, frames, *size = shape
        first = self._fitting(f"{part}_first", {name: (batch, channels, 1, *size)})
        rest = (frames - 1) // unit
        if not rest:
            return Chunks(first, None, (), results, unit)
        shapes = (
            (plan, sizes)
            for plan in self._all_fitting_chunks(part, name, shape, unit)
            if (sizes := chunk_sizes(plan.entry, name, rest, unit))
        )
        found = next(shapes, None)
        if found is None:
            if not any(plan.entry.name == f"{part}_next" for plan in self.plans):
                raise ValueError(f"{part}_next is missing in the folder")
            raise ValueError(f"its chunks do not add up to 1 + {rest} latent frames")
        return Chunks(first, found[0], found[1], results, unit)

    def _all_fitting_chunks(
        self, part: str, name: str, shape: tuple[int, ...], unit: int
    ) -> Iterator[OpenPlan]:
        """Plans of following chunks that take this size, whatever their length."""
        batch, channels, _, *size = shape
        for plan in self.plans:
            if plan.entry.name == f"{part}_next":
                least, _ = chunk_range(plan.entry, name, unit)
                if self._takes(plan, {name: (batch, channels, least * unit, *size)}):
                    yield plan

    def camera_head(self) -> OpenPlan:
        width = 2 * self.host.config.vggt.embed_dim
        return self._fitting("camera_head", {"camera_tokens": (1, self.shape[0], width)})

    def depth_head(self) -> OpenPlan:
        return self._dense("depth_head")

    def point_head(self) -> OpenPlan:
        return self._dense("point_head")

    def _dense(self, name: str) -> OpenPlan:
        frames, height, width, *_ = self.shape
        vggt = self.host.config.vggt
        patches = (height // vggt.patch_size) * (width // vggt.patch_size)
        layer = (1, frames, patches, 2 * vggt.embed_dim)
        fitting = self._all_fitting(name, {"layer_0": layer})
        # 56 x 112 and 112 x 56 have as many patches.
        for plan in fitting:
            if (plan.entry.height, plan.entry.width) == (height, width):
                return plan
        listed = "; ".join(
            sorted({p.entry.shape_text() for p in self.plans if p.entry.name == name})
        )
        raise ValueError(f"it is for {listed}")

    def denoiser(self) -> PlannedSteps:
        *_, batch, guided = self.shape
        if not guided:
            raise ValueError("it is for guidance above 1")
        channels, frames, rows, columns = self.grid
        latents = (batch, channels, frames, rows, columns)
        own = self.host.config.transformer
        control = (GUIDED_ROWS * batch, own.in_dim - own.out_dim, *latents[2:])
        steps = list(self._all_fitting("denoiser_step", {"latents": latents}))
        prepares = list(self._all_fitting("denoiser_prepare", {"control": control}))
        for step in steps:
            for prepare in prepares:
                # What one gives the other reads: keys and values in the same dtype.
                if prepare.entry.outputs[2].dtype == step.entry.inputs[3].dtype:
                    return PlannedSteps(prepare, step, own.text_len)
        raise ValueError("its two graphs are of different dtypes")


def chunk_range(entry: Entry, name: str, unit: int) -> tuple[int, int]:
    """Least and most latent frames of a chunk that a graph takes."""
    spec = next(spec for spec in entry.inputs if spec.name == name)
    sizes = [
        spec.sizes({axis: getattr(dim, which) for axis, dim in entry.dims.items()})[2]
        for which in ("least", "most")
    ]
    return sizes[0] // unit, sizes[1] // unit


def chunk_sizes(entry: Entry, name: str, latent_frames: int, unit: int) -> tuple[int, ...]:
    """The fewest chunks, of nearly one length, that make up these latent frames; () if none do."""
    least, most = chunk_range(entry, name, unit)
    count = -(-latent_frames // most)
    short, longer = divmod(latent_frames, count)
    if short < least:
        return ()
    return (short + 1,) * longer + (short,) * (count - longer)
