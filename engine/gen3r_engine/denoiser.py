"""The denoising loop with everything constant taken out, as one CUDA graph a step.

`gen3r.stages.denoise` computes the same, plainly. Here, of a request:

* `WanTransformer.prepare` runs once: patch embedding of the control latents, camera features, keys
  and values of text and image for all blocks, rotary tables;
* `WanTransformer.tables` runs once: time embedding and modulation of every block at every step;
* both branches of guidance share the first block up to its cross-attention.

A step (velocity, guidance, solver) reads and writes static buffers only and finds its modulation
and its solver's coefficients by a counter on the device, which it advances itself. So it can be
captured once per shape and replayed for every step of every request with nothing in between on the
host. The blocks are compiled one by one (`torch.compile` of a block serves all blocks of its
shape), which keeps compilation to seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gen3r.schedulers import Schedule
from gen3r.transformer import Conditions, RawConditions, StepConstants, WanTransformer
from gen3r.transformer_blocks import KeysValues
from gen3r_engine.clock import StepClock
from gen3r_kernels import EulerStep, MultistepStep, guidance_step
from gen3r_kernels.guidance_step import coefficient_table

if TYPE_CHECKING:
    from gen3r_engine.planned import PlannedSteps

OnStep = Callable[[int, float, Tensor], None]  # index, timestep, latents after the step
Velocity = Callable[[Tensor, Tensor], Tensor]  # latents, tables of one step -> [R, C, f, h, 2 w]
STEPS = 64  # schedules up to this length share the buffers of a plan
AHEAD = 2  # replays in the GPU's queue beyond the one that runs


class Cancelled(RuntimeError):
    """The loop was asked to stop."""


class PlanKey(NamedTuple):
    """What a captured step depends on."""

    latents: tuple[int, ...]  # [n, C, f, h, 2 w]
    rows: int  # n, or 2 n with guidance
    image_tokens: int
    steps: int  # capacity of the tables
    solver: type[EulerStep] | type[MultistepStep]


@dataclass
class Plan:
    """Buffers and graphs of one shape.

    buffers : every tensor that a step reads or writes, by name
    velocity : of latents and one step's tables; reads those that `WanTransformer.prepare` fills
    graphs : by whether the step has a corrector
    """

    key: PlanKey
    buffers: dict[str, Tensor]
    velocity: Velocity
    graphs: dict[bool, torch.cuda.CUDAGraph] = field(default_factory=dict)


class Denoiser:
    """Runs the denoising loop of one transformer; see the module.

    Parameters
    ----------
    compiled : run the blocks through torch.compile. The transformer's blocks are marked in place.
    captured : replay steps as CUDA graphs. Needs a CUDA device.

    Attributes
    ----------
    captures : how many steps were captured so far; it does not grow for a known shape.
    step_times, gaps : milliseconds of each step of the last run, and between one step's end and
        the next one's beginning on the device. Empty on a CPU.

    Raises
    ------
    ValueError : `captured` with a transformer that is not on a CUDA device.
    """

    def __init__(self, transformer: WanTransformer, *, compiled: bool, captured: bool) -> None:
        self.transformer = transformer
        self.device = transformer.patch_embedding.weight.device
        if captured and self.device.type != "cuda":
            raise ValueError(
                f"a CUDA graph cannot be captured on {self.device}; use captured=False there"
            )
        self.compiled, self.captured = compiled, captured
        self.captures = 0
        self.step_times: list[float] = []
        self.gaps: list[float] = []
        self._plan: Plan | None = None
        if compiled:
            for block in transformer.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def release(self) -> None:
        """Free graphs and buffers; the next run makes them again."""
        self._plan = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    @torch.no_grad()
    def run(
        self,
        conditions: Conditions,
        noise: Tensor,  # [n, C, f, h, 2 w] float32
        schedule: Schedule,
        guidance_scale: float,
        on_step: OnStep | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Tensor:  # [n, C, f, h, 2 w] float32 joint latents
        """Denoise `noise`. With guidance the conditions hold 2 n rows, the negative ones first.

        Scene by scene the control latents, cameras and image tokens of both halves of the rows must
        be equal. `on_step` gets a copy of the latents after each step; on a GPU it is called while
        the next steps are running. `cancelled` is asked before every step.

        Raises
        ------
        ValueError : rows that are neither n nor 2 n.
        Cancelled : `cancelled` said so; nothing is left running.
        """
        plan = self.prepare(conditions, noise, schedule)
        tables = self.transformer.tables(self._timesteps(schedule))
        self._load(plan, noise, schedule, guidance_scale, tables)
        self._loop(plan, schedule, on_step, cancelled or (lambda: False))
        return plan.buffers["latents"].clone()

    @torch.no_grad()
    def run_planned(
        self,
        steps: PlannedSteps,
        conditions: RawConditions,  # of 2 n rows, the negative ones first
        noise: Tensor,  # [n, C, f, h, 2 w] float32
        schedule: Schedule,
        guidance_scale: float,
        on_step: OnStep | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Tensor:  # [n, C, f, h, 2 w] float32 joint latents
        """`run`, with the transformer from exported plans: nothing is compiled or captured here."""
        if self._plan is not None:  # another shape's graph: the two may not fit side by side
            self.release()
        rows = len(conditions.text)
        tokens = conditions.image.shape[1]
        tables, velocity = steps.begin(conditions, self._timesteps(schedule))
        key = PlanKey(tuple(noise.shape), rows, tokens, len(schedule), type(schedule.steps[0]))
        plan = Plan(key, self._buffers(key, tables.shape[1]), velocity)
        self._load(plan, noise, schedule, guidance_scale, tables)
        self._loop(plan, schedule, on_step, cancelled or (lambda: False))
        return plan.buffers["latents"]

    @torch.no_grad()
    def prepare(
        self,
        conditions: Conditions,
        noise: Tensor,  # [n, C, f, h, 2 w]
        schedule: Schedule,
    ) -> Plan:
        """All that comes before the first step: compile and capture a new shape, fill its buffers.

        `run` does this itself; done before, it takes a moment there.

        Raises
        ------
        ValueError : rows that are neither n nor 2 n.
        """
        rows = conditions.text.shape[0]
        if rows not in (len(noise), 2 * len(noise)):
            raise ValueError(f"{rows} rows of conditions for {len(noise)} scenes; give n or 2 n")
        constants = self.transformer.prepare(conditions, True, scenes=len(noise))
        return self._ready(_key(conditions, noise, schedule), constants, schedule)

    def knows(self, conditions: Conditions, noise: Tensor, schedule: Schedule) -> bool:
        """Whether buffers and graphs for a run on these are there, so that none is made."""
        plan = self._plan
        if plan is None or plan.key != _key(conditions, noise, schedule):
            return False
        return not self.captured or {_corrected(s) for s in schedule.steps} <= plan.graphs.keys()

    def _ready(self, key: PlanKey, constants: StepConstants, schedule: Schedule) -> Plan:
        """The plan for this shape with the request's constants in its buffers."""
        if self._plan is None or self._plan.key != key:
            self.release()
            self._plan = self._make(key, constants)
        plan = self._plan
        for name, value in _named(constants):
            if plan.buffers[name] is not value:
                plan.buffers[name].copy_(value)
        for corrected in sorted({_corrected(step) for step in schedule.steps}):
            if self.captured and corrected not in plan.graphs:
                plan.graphs[corrected] = self._capture(plan, corrected)
        return plan

    def _make(self, key: PlanKey, constants: StepConstants) -> Plan:
        """Buffers of a shape; the first request's constants become the buffers of later ones."""
        buffers = self._buffers(key, 6 * len(constants.keys_values) + 2)
        buffers |= dict(_named(constants))
        return Plan(key, buffers, partial(self._velocity, constants))

    def _velocity(self, constants: StepConstants, latents: Tensor, tables: Tensor) -> Tensor:
        return self.transformer.velocity(latents, tables, constants)

    def _buffers(self, key: PlanKey, width: int) -> dict[str, Tensor]:
        """What every step reads and writes, for tables of `width` rows."""
        device = self.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        buffers = {
            "latents": zeros(*key.latents),
            "step": torch.zeros(1, dtype=torch.int64, device=device),
            "tables": zeros(key.steps, width, self.transformer.config.dim),
            "coefficients": zeros(key.steps, 9),
        }
        if key.solver is MultistepStep:
            for name in ("corrected", "m_1", "m_2"):
                buffers[name] = zeros(*key.latents)
        return buffers

    def _timesteps(self, schedule: Schedule) -> Tensor:
        return torch.tensor(schedule.timesteps, dtype=torch.float32, device=self.device)

    def _load(
        self,
        plan: Plan,
        noise: Tensor,
        schedule: Schedule,
        guidance_scale: float,
        tables: Tensor,  # [steps, 6 L + 2, D]
    ) -> None:
        """Everything else of a request into the buffers."""
        buffers, count = plan.buffers, len(schedule)
        buffers["tables"][:count].copy_(tables)
        rows = coefficient_table(schedule.steps, guidance_scale, self.device)
        buffers["coefficients"][:count].copy_(rows)
        buffers["latents"].copy_(noise)
        buffers["step"].zero_()
        for name in ("corrected", "m_1", "m_2"):
            if name in buffers:
                buffers[name].zero_()

    def _step(self, plan: Plan, corrected: bool) -> None:
        """One step from buffers to buffers, without a word from the host."""
        buffers = plan.buffers
        latents, step = buffers["latents"], buffers["step"]
        tables = buffers["tables"].index_select(0, step)
        velocity = plan.velocity(latents, tables)
        guided = plan.key.rows == 2 * len(latents)
        uncond, cond = velocity.chunk(2) if guided else (None, velocity)
        history: tuple[Tensor, ...] = ()
        form: EulerStep | MultistepStep = EulerStep(0.0)
        if plan.key.solver is MultistepStep:
            history = (buffers["corrected"], buffers["m_1"], buffers["m_2"])
            form = MultistepStep(0.0, (0.0,) * 4 if corrected else None, (0.0,) * 3)
        following, history = guidance_step(
            latents,
            uncond,
            cond,
            1.0,
            form,
            history,
            coefficients=buffers["coefficients"].index_select(0, step)[0],
            backends=self.transformer.backends,
        )
        # The history may hold the buffers themselves: the latents as the corrected sample, m_1 as
        # the new m_2. So the oldest is copied first, and the latents last.
        for name, value in reversed(list(zip(("corrected", "m_1", "m_2"), history, strict=False))):
            buffers[name].copy_(value)
        latents.copy_(following)
        step.add_(1)

    def _capture(self, plan: Plan, corrected: bool) -> torch.cuda.CUDAGraph:
        """The step as a graph. A first run outside compiles kernels and fills library caches."""
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g in plan.graphs.values()), None)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._step(plan, corrected)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        # Other threads may allocate or copy meanwhile: only this one is held to what a graph takes.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._step(plan, corrected)
        self.captures += 1
        return graph

    def _loop(
        self,
        plan: Plan,
        schedule: Schedule,
        on_step: OnStep | None,
        cancelled: Callable[[], bool],
    ) -> None:
        latents, waiting = plan.buffers["latents"], []
        clock = StepClock(self.device)
        captured = bool(plan.graphs)
        with _no_recompilation(captured):
            for index, step in enumerate(schedule.steps):
                if cancelled():
                    clock.finish()
                    raise Cancelled(f"stopped before step {index + 1} of {len(schedule)}")
                corrected = _corrected(step)
                with clock.step():
                    if captured:
                        plan.graphs[corrected].replay()
                    else:
                        self._step(plan, corrected)
                waiting.append((index, None if on_step is None else latents.clone()))
                while len(waiting) > (AHEAD if captured else 0):
                    clock.wait(waiting[0][0])
                    self._tell(schedule, on_step, *waiting.pop(0))
            self.step_times, self.gaps = clock.finish()
        for item in waiting:
            self._tell(schedule, on_step, *item)

    @staticmethod
    def _tell(
        schedule: Schedule, on_step: OnStep | None, index: int, latents: Tensor | None
    ) -> None:
        if on_step is not None and latents is not None:
            on_step(index, schedule.timesteps[index], latents)


@contextmanager
def _no_recompilation(active: bool) -> Iterator[None]:
    """Inside, a compiled function that does not know its inputs raises and does not compile."""
    if not active:
        yield
        return
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def _key(conditions: Conditions, noise: Tensor, schedule: Schedule) -> PlanKey:
    return PlanKey(
        latents=tuple(noise.shape),
        rows=conditions.text.shape[0],
        image_tokens=conditions.image.shape[1],
        steps=max(STEPS, len(schedule)),
        solver=type(schedule.steps[0]),
    )


def _corrected(step: EulerStep | MultistepStep) -> bool:
    return isinstance(step, MultistepStep) and step.corrector is not None


def _named(constants: StepConstants) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `constants` that differ from request to request, by a name of their own.

    The rotary tables belong to the shape: `gen3r.rope` keeps them.
    """
    yield "embedding", constants.embedding
    for index, keys_values in enumerate(constants.keys_values):
        for name in KeysValues._fields:
            yield f"{name}.{index}", getattr(keys_values, name)
