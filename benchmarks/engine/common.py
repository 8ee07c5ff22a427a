"""What the engine suites share: options, providers, rows that are written as they come."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    BadInput,
    Measurement,
    environment,
    library_versions,
    percentiles,
    write_rows,
)
from benchmarks.timing import Ceiling, shape_name
from gen3r.config import GEN3R, Gen3RConfig
from gen3r.nano import ARCHITECTURE
from gen3r_engine.config import EngineConfig
from gen3r_engine.presets import PresetChoice, resolve_here
from gen3r_kernels import Backends

MODELS = {"gen3r": GEN3R, "nano": ARCHITECTURE}
# As upstream computes: separate PyTorch operators, PyTorch's own attention.
EAGER = Backends(operators="reference", attention="sdpa")
GUIDANCE = 5.0


class Unavailable(RuntimeError):
    """A provider that cannot run here; the text says why."""


@dataclass(frozen=True)
class Provider:
    """A way to run the model. `preset` None: the plain pipeline, as upstream computes."""

    name: str
    preset: str | None
    residency: str = "resident"

    def config(self, options: Options) -> EngineConfig:
        """The engine's config. On a CPU the plain path, for there is nothing to capture."""
        return EngineConfig(
            preset=self.preset or "exact",
            residency=self.residency,
            device=options.device.type,
            dtype=options.dtype_name,
            compiled=options.cuda and not options.no_compile,
            captured=options.cuda,
            cache_dir=options.cache_dir,
            max_batch=options.batch,
        )

    def choice(self, options: Options) -> PresetChoice:
        """What the preset comes to on this machine.

        Raises
        ------
        Unavailable : the preset does not run here.
        """
        try:
            return resolve_here(self.config(options))[1]
        except ValueError as error:
            raise Unavailable(str(error)) from error


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", None),
        Provider("exact", "exact"),
        Provider("fp8", "fp8"),
        Provider("24gb", "exact", "24gb"),
        Provider("12gb", "exact", "12gb"),
    )
}


@dataclass(frozen=True)
class Options:
    """The suites' common options, resolved."""

    providers: tuple[Provider, ...]
    model: Gen3RConfig
    frames: int
    size: int
    steps: int
    batch: int
    device: torch.device
    dtype_name: str
    no_compile: bool
    cache_dir: Path | None
    out: Path | None
    commit: str | None
    checkpoint: str | None
    arguments: argparse.Namespace

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def shape(self) -> str:
        """frames x height x width, with the scenes in front where there are several."""
        sizes = (self.frames, self.size, self.size)
        return shape_name(*((self.batch, *sizes) if self.batch > 1 else sizes))


def parser(
    suite: str, description: str | None, providers: Sequence[str]
) -> argparse.ArgumentParser:
    """The common options of a suite; `providers` are its default ones."""
    made = argparse.ArgumentParser(
        prog=f"gen3r-engine bench --suite {suite}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = made.add_argument
    add("--preset", nargs="+", choices=tuple(PROVIDERS), default=list(providers))
    add("--model", choices=tuple(MODELS), help="sizes (default: gen3r on a GPU, nano on a CPU)")
    add("--frames", type=int, help="4k + 1 (default: the model's)")
    add("--size", type=int, help="pixels, a multiple of 56 (default: the model's)")
    add("--steps", type=int, default=50, help="of the schedule (default: 50)")
    add("--batch", type=int, default=1, help="scenes in one step (default: 1)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--dtype", choices=("bfloat16", "float32"), help="default: by device")
    add("--no-compile", action="store_true", help="capture the step without torch.compile")
    add("--cache_dir", type=Path, help="of compiled code (default: the engine's)")
    add("--pretrained_model_name_or_path", help="weights (default: random ones)")
    add("--out", type=Path, help="results folder (default: benchmarks/results)")
    add("--commit", "--revision", help="recorded where the tree is not a git checkout")
    return made


def resolve_options(arguments: argparse.Namespace) -> Options:
    """The options with their defaults for this machine.

    Raises
    ------
    BadInput : a size, length or device that cannot be.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA GPU; use --device cpu")
    cuda = device == "cuda"
    model = MODELS[arguments.model or ("gen3r" if cuda else "nano")]
    frames, size = arguments.frames or model.num_frames, arguments.size or model.size
    if frames % 4 != 1:
        raise BadInput(f"--frames {frames} is not 4k + 1; use {frames // 4 * 4 + 1}")
    if size <= 0 or size % 56:
        raise BadInput(f"--size {size} is not a multiple of 56; use {max(56, size // 56 * 56)}")
    for name in ("steps", "batch"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name} {getattr(arguments, name)} is below 1; use 1 or more")
    return Options(
        providers=tuple(PROVIDERS[name] for name in dict.fromkeys(arguments.preset)),
        model=model,
        frames=frames,
        size=size,
        steps=arguments.steps,
        batch=arguments.batch,
        device=torch.device(device),
        dtype_name=arguments.dtype or ("bfloat16" if cuda else "float32"),
        no_compile=arguments.no_compile,
        cache_dir=arguments.cache_dir,
        out=arguments.out,
        commit=arguments.commit,
        checkpoint=arguments.pretrained_model_name_or_path,
        arguments=arguments,
    )


@dataclass
class Rows:
    """A suite's rows; every addition is written, so that a later failure costs nothing."""

    suite: str
    options: Options
    rows: list[Measurement] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    path: Path | None = None

    def __post_init__(self) -> None:
        self.where = environment(self.options.commit)
        self.versions = library_versions()

    def add(
        self,
        case: str,
        provider: str,
        metric: str,
        unit: str,
        samples: Sequence[float],
        *,
        share: float | None = None,
        error: float | None = None,
        shape: str | None = None,
        **config: Any,
    ) -> None:
        """One row; it is printed and written. No samples, no row."""
        if not samples:
            return
        measurement = Measurement(
            case,
            provider,
            shape or self.options.shape,
            self.options.dtype_name,
            metric,
            unit,
            list(samples),
            share,
            error,
            {**config, "versions": self.versions},
        )
        self.rows.append(measurement)
        low, middle, high = percentiles(measurement.samples)
        spread = f" ({low:,.5g} to {high:,.5g})" if len(samples) > 1 else ""
        notes = "" if share is None else f", {share:.0%} of the ceiling"
        notes += " first call" if config.get("phase") == "compile" else ""
        text = f"{case:<20} {provider:<8} {metric:<12} {middle:>12,.5g} {unit}{spread}{notes}"
        print(text, flush=True)
        self.save()

    def ceilings(self, found: dict[str, Ceiling]) -> None:
        """The machine's ceilings as rows."""
        for ceiling in found.values():
            metric = "gbps" if ceiling.unit == "GB/s" else "tflops"
            self.rows.append(
                Measurement(
                    "ceiling",
                    ceiling.name,
                    ceiling.shape,
                    ceiling.dtype,
                    metric,
                    ceiling.unit,
                    ceiling.samples,
                )
            )
        self.save()

    def save(self) -> None:
        self.path = write_rows(
            self.rows, self.suite, self.options.out, merge=True, where=self.where
        )

    def each(self, measure: Callable[[Provider], None]) -> None:
        """Measure provider by provider; one that breaks does not cost the others their rows."""
        for provider in self.options.providers:
            try:
                measure(provider)
            except Unavailable as reason:
                print(f"{provider.name}: skipped: {reason}", flush=True)
            except Exception as error:  # the next provider may work
                text = f"{provider.name}: {type(error).__name__}: {error}"
                self.failed.append(text)
                print(f"FAILED: {text}", flush=True)
            release(self.options.device)

    def finish(self) -> int:
        """Say where the rows are; the exit code."""
        print(self.path or "no rows")
        for text in self.failed:
            print(f"FAILED: {text}", file=sys.stderr)
        return 1 if self.failed else 0


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next provider meets an empty allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def tflops_rows(
    rows: Rows,
    case: str,
    provider: Provider,
    milliseconds: Sequence[float],
    flops: int,
    ceilings: dict[str, Ceiling],
) -> None:
    """Rate of counted work, with its share of the ceiling of the provider's products."""
    rates = [1e-9 * flops / ms for ms in milliseconds]
    name = "fp8" if provider.preset == "fp8" and "fp8" in ceilings else "bf16"
    ceiling = ceilings[name].value
    share = percentiles(rates)[1] / ceiling
    config: dict[str, Any] = {"ceiling": name, "ceiling_value": ceiling, "flops": flops}
    rows.add(case, provider.name, "tflops", "TFLOP/s", rates, share=share, **config)
