"""Whole scenes for the suites: random models, requests, and one scene's stages and memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.engine.common import EAGER, GUIDANCE, Options, Provider, Rows, Unavailable
from benchmarks.pipeline import build, check, make_request
from benchmarks.weights import fill_transformer
from gen3r.pipeline import STAGES, Gen3RPipeline
from gen3r.scene import Scene, SceneRequest
from gen3r_engine.engine import Engine
from gen3r_engine.fusion import FusionConfig
from gen3r_kernels import Backends


@dataclass
class Runner:
    """A loaded model: the plain pipeline (`engine` None) or an engine."""

    provider: Provider
    pipeline: Gen3RPipeline
    engine: Engine | None

    def scene(self, request: SceneRequest, steps: int) -> Scene:
        """One scene, alone."""
        if self.engine is not None:
            return self.engine.generate(
                request, steps=steps, guidance=GUIDANCE, fusion=FusionConfig()
            )[0]
        scenes = self.pipeline(
            requests=[request], num_inference_steps=steps, guidance_scale=GUIDANCE
        )
        assert isinstance(scenes, list)
        return scenes[0]

    def graph_gib(self) -> float:
        """GiB that captured steps keep for themselves; allocation peaks do not count them."""
        if self.engine is None or not torch.cuda.is_available():
            return 0.0
        held = [s["total_size"] for s in torch.cuda.memory_snapshot() if any(s["segment_pool_id"])]
        return sum(held) / 2**30


def load(provider: Provider, options: Options) -> Runner:
    """The model: of the checkpoint, or with random weights made on the device.

    Raises
    ------
    Unavailable : the preset does not run here, or not with this model.
    """
    choice = None if provider.preset is None else provider.choice(options)
    backends = EAGER if choice is None else Backends(attention=choice.attention)
    device, config = str(options.device), provider.config(options)
    if options.checkpoint is not None:
        if choice is not None:
            engine = Engine.load(options.checkpoint, config)
            return Runner(provider, engine.pipeline, engine)
        pipeline = Gen3RPipeline.from_pretrained(
            options.checkpoint, torch_dtype=options.dtype, device=device, backends=backends
        )
        return Runner(provider, pipeline, None)
    pipeline = build(options.model, options.dtype, device, backends)
    fill_transformer(pipeline.transformer)
    if choice is None:
        return Runner(provider, pipeline, None)
    try:
        return Runner(provider, pipeline, Engine.of(pipeline, config))
    except ValueError as error:
        raise Unavailable(str(error)) from error


@contextmanager
def loaded(provider: Provider, options: Options) -> Iterator[Runner]:
    """A runner whose memory is given back afterwards."""
    runner = load(provider, options)
    try:
        yield runner
    finally:
        if runner.engine is not None:
            runner.engine.close()


def requests_for(options: Options, count: int) -> list[SceneRequest]:
    """1view scenes with a built-in camera path, which differ in their seeds."""
    first = make_request("1view", options.model, options.frames, options.size)
    return [dataclasses.replace(first, seed=42 + index) for index in range(count)]


@dataclass
class Solo:
    """One scene alone, after a first one that compiled and filled caches.

    first_seconds, seconds : of the whole calls. stages : seconds by stage name. step_ms : of its
    steps. peak_gib, reserved_gib : see `memory`; None on a CPU.
    """

    first_seconds: float
    seconds: float
    stages: dict[str, float]
    step_ms: list[float]
    peak_gib: float | None
    reserved_gib: float | None


def solo(runner: Runner, options: Options, steps: int) -> Solo:
    """A scene of few steps, twice.

    The peak is the larger of the first scene's allocations, in which steps are captured, and the
    second's together with what the graph keeps for itself.
    """
    (request,) = requests_for(options, 1)
    if options.cuda:
        torch.cuda.empty_cache()
    _, first, first_peak = timed(runner, request, steps)
    again = dataclasses.replace(request, prompt=f"{request.prompt} again")  # a text not yet kept
    scene, seconds, peak = timed(runner, again, steps)
    check(scene, options.frames, options.size)
    seconds_of = scene.info["seconds"]
    found: dict[str, float] = {n: seconds_of[n] for n in (*STAGES, "fuse") if n in seconds_of}
    step_ms = list(runner.engine.denoiser.step_times) if runner.engine is not None else []
    if not step_ms:
        step_ms = [1000 * found["denoise"] / steps]
    reserved = None
    if options.cuda:
        peak = max(first_peak, peak + runner.graph_gib())
        reserved = torch.cuda.max_memory_reserved() / 2**30
    return Solo(first, seconds, found, step_ms, peak if options.cuda else None, reserved)


def timed(runner: Runner, request: SceneRequest, steps: int) -> tuple[Scene, float, float]:
    """A scene, its seconds, and the GiB allocated at its peak (0 on a CPU)."""
    cuda = runner.pipeline.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scene = runner.scene(request, steps)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return scene, seconds, peak


def solo_rows(rows: Rows, provider: Provider, found: Solo, steps: int) -> None:
    """Peak memory, stages, step and first call of a solo scene."""
    if found.peak_gib is not None:
        rows.add(
            *("peak_memory", provider.name, "memory", "GiB", [found.peak_gib]),
            reserved_gib=found.reserved_gib,
            residency=provider.residency,
            steps=steps,
        )
    config: dict[str, Any] = {"steps": steps, "scenes": 1}
    for stage, seconds in found.stages.items():
        case = f"scene_{stage.replace(' ', '_')}"
        rows.add(case, provider.name, "time", "ms", [1000 * seconds], **config)
    rows.add("scene_step", provider.name, "time", "ms", found.step_ms, **config)
    rest = found.seconds - math.fsum(found.stages.values())
    rows.add("scene_total", provider.name, "time", "s", [found.seconds], other=rest, **config)
    first = found.first_seconds
    rows.add("scene_total", provider.name, "time", "s", [first], phase="compile", **config)
