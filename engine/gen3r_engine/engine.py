"""Engine: a model loaded once, scenes out of it as fast as the machine gives them.

from gen3r_engine import Engine, EngineConfig, SceneRequest

engine = Engine.load("checkpoints/gen3r", EngineConfig(preset="exact", max_batch=2))
for scene in engine.stream([SceneRequest([photo], "a stone arena", cameras="zoom_in")]):
    scene.save(f"results/{scene.info['index']}")
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r.pipeline import Gen3RPipeline
from gen3r.run import Progress, full_float32
from gen3r.scene import Scene, SceneRequest
from gen3r.schedulers import make_schedule
from gen3r_engine.adopting import adopt_pipeline
from gen3r_engine.caches import CacheFolder
from gen3r_engine.config import EngineConfig, as_config
from gen3r_engine.denoiser import Cancelled, Denoiser
from gen3r_engine.events import Event, OnEvent, Reporter, SceneError
from gen3r_engine.flow import Flow
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.loading import LoadedModel, load_pipeline
from gen3r_engine.memory import OutOfMemory, plan_batches
from gen3r_engine.plan_matching import Host
from gen3r_engine.plans import EnginePlans
from gen3r_engine.prompts import PromptCache, prompt_fingerprint
from gen3r_engine.scene_batches import Batch, Sampling
from gen3r_engine.scene_stages import SceneStages
from gen3r_engine.streams import Streams
from gen3r_engine.warming import Warmth, rehearse, run_once

__all__ = ["Cancelled", "Engine", "Event", "OutOfMemory", "SceneError"]


class Engine:
    """Runs requests on one loaded model; make it with `Engine.load`.

    Attributes
    ----------
    config : as given. choice : what it came to on this device (preset row, tier, precision, dtype).
    pipeline : the loaded components. denoiser : the denoising loop. prompts : text features kept.
    plans : the exported plans that it runs, None without.
    notes : what a person should know about how this engine runs, one sentence each.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | str = "exact") -> None:
        self.config, self.choice = as_config(config), model.choice
        self.device, self.model, self.pipeline = model.device, model, model.pipeline
        cuda = self.device.type == "cuda"
        self.denoiser = Denoiser(
            self.pipeline.transformer,
            compiled=self.config.compiled and cuda,
            captured=self.config.captured and cuda,
        )
        self.plans = None if self.config.plans is None else self._open_plans(self.config.plans)
        identity = model.fingerprint + ("" if self.plans is None else self.plans.text_identity)
        text_len = self.pipeline.config.transformer.text_len
        self.prompts = PromptCache(
            self.config.prompt_cache,
            CacheFolder.of(self.config.cache_dir).prompts,
            prompt_fingerprint(identity, self.pipeline.dtype, text_len),
        )
        self.stages = SceneStages(
            self.pipeline,
            model.residency,
            self.prompts,
            self.denoiser,
            self.device,
            self.choice,
            self.plans,
        )
        self.stages.streams = Streams(self.device, apart=self.overlaps)
        self.warmth = Warmth(
            CacheFolder.of(self.config.cache_dir),
            self.pipeline,
            model.facts.name,
            self.choice.preset,
            self.choice.attention,
            enabled=self.config.compiled and cuda,
        )
        self.notes = [] if cuda else ["on a CPU the engine runs the plain path, without compiling"]
        if self.plans is not None:
            self.notes += [f"plan {line}" for line in self.plans.report]
            self.plans.notes = self.notes  # those of requests stand with the others
        self._busy = threading.Lock()
        self._stop: threading.Event | None = None

    @classmethod
    def load(
        cls, checkpoint: str | Path | None = None, config: EngineConfig | str = "exact"
    ) -> Engine:
        """Load a checkpoint (folder or hub id; None: the embedded model) as the config says.

        Raises
        ------
        CheckpointError : a folder that does not hold a loadable checkpoint; all problems at once.
        ValueError : a preset, tier or device that cannot be had here; the text names what can.
        """
        config = as_config(config)
        return cls(load_pipeline(checkpoint, config), config)

    @classmethod
    def of(cls, pipeline: Gen3RPipeline, config: EngineConfig | str = "exact") -> Engine:
        """An engine of a pipeline that was made already, on the device that the config asks for.

        The pipeline is the engine's from now: its transformer takes the preset's precision, and
        modules move to where the tier keeps them. Text features are kept for this engine alone.

        Raises
        ------
        ValueError : as `load`; or the pipeline is on another device or in another dtype.
        """
        config = as_config(config)
        return cls(adopt_pipeline(pipeline, config), config)

    def _open_plans(self, folder: Path) -> EnginePlans:
        facts, choice = self.model.facts, self.choice
        capability = facts.capability
        host = Host(
            hashes=self.model.hashes,
            config=self.pipeline.config,
            device=self.device,
            dtype=self.pipeline.dtype,
            gpu=None if capability is None else facts.name,
            capability=None if capability is None else "".join(map(str, capability)),
            preset=choice.preset,
            encoder_precision=self.config.encoder_precision,
        )
        return EnginePlans(folder, host)

    @property
    def overlaps(self) -> bool:
        """Whether stages of different scenes run beside each other; the smallest tier has room for
        one stage only."""
        return self.config.overlap and self.choice.residency != "12gb"

    def generate(
        self,
        requests: Sequence[SceneRequest] | SceneRequest,
        *,
        steps: int = 50,
        guidance: float | None = None,
        solver: str = "euler",
        shift: float = 5.0,
        point_maps: bool = False,
        fusion: FusionConfig | None = None,
        progress: Progress | None = None,
        on_event: OnEvent | None = None,
        latents: Tensor | None = None,  # [N, 16, f, h, 2 w]
        posterior_noise: Tensor | None = None,  # [N, 16, f, h, w]
    ) -> list[Scene]:
        """All scenes, in the order of the requests. Parameters and errors as `stream`."""
        return list(
            self.stream(
                requests,
                steps=steps,
                guidance=guidance,
                solver=solver,
                shift=shift,
                point_maps=point_maps,
                fusion=fusion,
                progress=progress,
                on_event=on_event,
                latents=latents,
                posterior_noise=posterior_noise,
            )
        )

    def stream(
        self,
        requests: Sequence[SceneRequest] | SceneRequest,
        *,
        steps: int = 50,
        guidance: float | None = None,
        solver: str = "euler",
        shift: float = 5.0,
        point_maps: bool = False,
        fusion: FusionConfig | None = None,
        progress: Progress | None = None,
        on_event: OnEvent | None = None,
        latents: Tensor | None = None,  # [N, 16, f, h, 2 w]
        posterior_noise: Tensor | None = None,  # [N, 16, f, h, w]
    ) -> Generator[Scene, None, None]:
        """Scenes as they finish, in the order of the requests, while later ones are worked on.

        `scene.info["index"]` is the request's position. Closing the iterator (leaving the loop)
        stops the work. A scene equals what its request gives alone, up to the rounding of batched
        products.

        Parameters
        ----------
        steps, guidance, solver, shift, point_maps : as `Gen3RPipeline.__call__`.
        fusion : the points of all frames become `Scene.cloud`, filtered and thinned out as this
            says, on the GPU where there is one. None: no cloud.
        progress : called with (stage, done, total). on_event : called with every `Event`. Both are
            called from the engine's threads, one call at a time.
        latents, posterior_noise : noise in place of what the seeds give.

        Raises
        ------
        ValueError : no requests, a value outside its limits, a request that does not fit.
        SceneError : a request failed; scenes finished before it have been given out.
        OutOfMemory : names the stage, the need and what fits.
        Cancelled : `cancel` was called.
        RuntimeError : the engine is at work on another call.
        """
        listed = [requests] if isinstance(requests, SceneRequest) else list(requests)
        schedule = make_schedule(solver, steps, shift=shift, euler=self.pipeline.scheduler)
        if guidance is None:
            guidance = self.pipeline.config.guidance_scale
        sampling = Sampling(schedule, guidance, point_maps, fusion, latents, posterior_noise)
        reporter = Reporter(progress, on_event)
        batches = self._batches(listed, reporter)
        for batch in batches:  # what runs without its plan is told before anything runs
            self.stages.announce(batch, sampling.guided)
        facts = {"steps": steps, "guidance_scale": guidance, "solver": solver}
        return self._stream(batches, sampling, reporter, facts)

    def warm_up(
        self,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
    ) -> dict[str, float]:
        """Compile what a scene of a shape runs: the denoising step, captured, and the other stages
        but for the text's. It is noted in the cache's manifest. What runs from plans, with guidance
        above 1, is run from them.

        Parameters
        ----------
        frames, size, batch : None takes the model's own frames and size (pixels, or height and
            width) and the config's largest batch.

        Returns seconds: ``first``, with compiling and capturing, ``step``, one step after that, and
        ``stages``, the encoding and decoding of a made-up scene.

        Raises
        ------
        ValueError : a shape that cannot be or does not fit. RuntimeError : the engine is at work.
        OutOfMemory : the plan was wrong; names what fits.
        """
        frames = self.pipeline.config.num_frames if frames is None else frames
        size = self.pipeline.config.size if size is None else size
        height, width = size if isinstance(size, tuple) else (size, size)
        batch = self.config.max_batch if batch is None else batch
        blank = torch.zeros(height, width, 3, dtype=torch.uint8)
        request = SceneRequest([blank], task="1view", num_frames=frames, height=height, width=width)
        if not 1 <= batch <= self.config.max_batch:
            raise ValueError(f"batch {batch} is not within 1 to max_batch {self.config.max_batch}")
        planned = self._plan([request] * batch)
        if len(planned) > 1:
            raise ValueError(
                f"a batch of {batch} does not fit this GPU's memory; use {len(planned[0])}"
            )
        shape = (frames, height, width, batch)
        indices = tuple(range(batch))
        made_up = Batch(indices, (request,) * batch, self.device)
        self.stages.announce(made_up, guided=True)
        steps = self.stages.planned(made_up, guided=True).denoiser
        watched = self.stages.watch("denoise", indices, request)
        with self._at_work(), watched, self.stages.streams.denoising():
            seconds = run_once(self.pipeline, self.denoiser, shape, steps=steps)
        with self._at_work():
            if self.choice.residency == "12gb":
                self.denoiser.release()
            seconds["stages"] = rehearse(self.stages, frames, height, width)
        if steps is None:
            self.warmth.done(shape, seconds)
        return seconds

    def cancel(self) -> None:
        """Stop the call at work, from any thread; it raises `Cancelled` within a step."""
        stop = self._stop
        if stop is not None:
            stop.set()

    def close(self) -> None:
        """Free the captured step and its buffers; the weights go with the engine itself.

        Raises
        ------
        RuntimeError : the engine is at work; close the iterator of `stream` first.
        """
        with self._at_work():
            self.denoiser.release()

    def _plan(self, requests: list[SceneRequest]) -> list[list[SceneRequest]]:
        return plan_batches(
            requests,
            replace(self.config, residency=self.choice.residency, overlap=self.overlaps),
            self.model.residency.weights_gib() + (0.0 if self.plans is None else self.plans.gib),
            self.choice.budget_gib,
        )

    def _batches(self, requests: list[SceneRequest], reporter: Reporter) -> list[Batch]:
        batches, start = [], 0
        for members in self._plan(requests):
            indices = tuple(range(start, start + len(members)))
            report = reporter.of if reporter else None
            batches.append(Batch(indices, tuple(members), self.device, report))
            first = members[0]
            self.warmth.before((first.num_frames, first.height, first.width, len(members)))
            start += len(members)
        return batches

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """One call at a time: the denoising loop has one set of buffers."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "the engine is at work on another call; finish or close that one first"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _stream(
        self, batches: list[Batch], sampling: Sampling, reporter: Reporter, facts: dict[str, Any]
    ) -> Generator[Scene, None, None]:
        with self._at_work(), full_float32(self.pipeline.dtype == torch.float32):
            stop = self._stop = threading.Event()
            try:
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                flow = Flow(
                    self.stages,
                    sampling,
                    stop,
                    retry=self.config.retry_on_oom,
                    release_first=self.choice.residency == "12gb",
                )
                beside = self.overlaps and len(batches) > 1
                scenes = flow.beside(batches) if beside else flow.in_order(batches)
                yield from self._told(scenes, reporter, facts)
            finally:
                self._stop = None

    def _told(
        self, scenes: Generator[Scene, None, None], reporter: Reporter, facts: dict[str, Any]
    ) -> Generator[Scene, None, None]:
        """The scenes with the facts of the call, told as events."""
        index = 0
        try:
            for scene in scenes:
                index = int(scene.info["index"])
                names = ("num_frames", "height", "width", "batch")
                frames, height, width, batch = (int(scene.info[name]) for name in names)
                shape = (frames, height, width, batch)
                cache = "none"  # a step from a plan is not compiled
                if "denoiser" not in scene.info.get("plans", {}).get("used", {}):
                    cache = self.warmth.before(shape)
                    self.warmth.done(shape, {})
                scene.info.update(facts, preset=self.choice.preset, compile_cache=cache)
                reporter.tell(Event("finished", index))
                yield scene
        except Cancelled:
            reporter.tell(Event("cancelled", index))
            raise
        except SceneError as error:
            reporter.tell(Event("failed", error.indices[0], error.stage))
            raise
