"""The nano suite: what a model makes of held-out procedural scenes whose truth is known exactly.

    result = run_nano(engine, NanoOptions(scenes=50))
    print(result.figures[0].mean)

Every figure has its trivial answers beside it, and a bar where one is set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gen3r_engine.depth_colors import depth_colors
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation import moves, text_colors
from gen3r_engine.evaluation.figures import Figure, plain
from gen3r_engine.evaluation.held_out import SEED, held_out
from gen3r_engine.evaluation.nano_autoencoders import geometry_parts, vae_part
from gen3r_engine.evaluation.nano_context import SHOWN, Context, Told
from gen3r_engine.evaluation.nano_scenes import (
    Moves,
    allview_part,
    moves_part,
    one_view_part,
    text_part,
    two_view_part,
)
from gen3r_engine.evaluation.record import environment, model_facts
from gen3r_engine.evaluation.sampling import Sampler
from gen3r_engine.evaluation.sheet import Row

PARTS = ("vae", "vggt", "adapter", "allview", "2view", "1view", "moves", "text")


@dataclass(frozen=True)
class NanoOptions:
    """What is measured, and how the scenes are sampled.

    Parameters
    ----------
    scenes : held-out clips; the text part looks for as many of its own.
    parts : of `PARTS`.
    frames, size : of a clip, size in pixels; None: the model's own.
    steps, guidance, solver, batch : as `Sampler`.
    seed : of the clips. Scene n draws its noise from seed n.

    Raises
    ------
    ValueError : an unknown part, no part, fewer than one scene or step.
    """

    scenes: int = 50
    parts: tuple[str, ...] = PARTS
    frames: int | None = None
    size: int | None = None
    steps: int = 50
    guidance: float | None = None
    solver: str = "euler"
    batch: int = 8
    seed: int = SEED

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"part '{''.join(unknown[:1])}' is unknown; known: {', '.join(PARTS)}")
        for name in ("scenes", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1; use 1 or more")


@dataclass
class NanoResult:
    """Everything that was measured.

    seconds : of every part, rendering under ``clips``. clip_moves : the camera move of every scene,
    a built-in one or ``random``. rows : for the contact sheet.
    """

    options: NanoOptions
    figures: list[Figure] = field(default_factory=list)
    moves: Moves | None = None
    shifts: list[text_colors.Shift] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    clip_moves: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {
            "suite": "nano",
            **self.facts,
            "settings": asdict(self.options),
            "clip_moves": list(self.clip_moves),
            "seconds": {name: plain(value) for name, value in self.seconds.items()},
            "stage_seconds": {name: plain(value) for name, value in self.stages.items()},
            "figures": [figure.to_dict() for figure in self.figures],
        }
        if self.moves is not None:
            found["moves"] = {"names": moves.MOVES, "confusion": self.moves.confusion}
        if self.shifts:
            found["text"] = [
                {
                    "clip": shift.case.number,
                    "part": shift.case.part.name,
                    "from": shift.case.part.color,
                    "to": shift.case.color,
                    "shift": plain(shift.shift),
                    "whole": plain(shift.whole),
                    "full": plain(shift.full),
                }
                for shift in self.shifts
            ]
        return found


def run_nano(
    engine: Engine,
    options: NanoOptions,
    told: Told | None = None,
    commit: str | None = None,
    checkpoint: str | None = None,
) -> NanoResult:
    """Measure all parts on one engine; nothing else may run on it meanwhile.

    told : called with (part, scenes done, scenes in all). commit : see `record.environment`.
    checkpoint : what the engine was loaded from, for the record; None: the embedded model.

    Raises
    ------
    ValueError : options that do not fit the model.
    """
    told = told or (lambda part, done, total: None)
    sampler = Sampler(engine, options.batch, options.steps, options.guidance, options.solver)
    own = engine.pipeline.config
    frames = own.num_frames if options.frames is None else options.frames
    size = own.size if options.size is None else options.size
    facts = {
        "model": model_facts(engine, checkpoint),
        "environment": environment(engine.device, commit),
    }
    result = NanoResult(options, facts=facts)
    started = time.perf_counter()
    told("clips", 0, options.scenes)
    numbers = range(options.scenes)
    clips = held_out(numbers, seed=options.seed, frames=frames, size=size, device=engine.device)
    told("clips", options.scenes, options.scenes)
    result.seconds["clips"] = time.perf_counter() - started
    result.clip_moves = clips.moves
    context = Context(engine, sampler, clips, options.seed, told)
    _measure(context, result)
    result.stages = dict(sampler.seconds)
    result.rows = _rows(context)
    return result


def _measure(context: Context, result: NanoResult) -> None:
    for name, run in _runs(context, result):
        started = time.perf_counter()
        result.figures += run()
        result.seconds[name] = time.perf_counter() - started


def _runs(context: Context, result: NanoResult) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    """The parts that are wanted, in the order of `PARTS`; VGGT and adapter share their work."""

    def asked_moves() -> list[Figure]:
        figures, result.moves = moves_part(context)
        return figures

    def swapped_text() -> list[Figure]:
        figures, result.shifts = text_part(context, result.options.scenes)
        return figures

    wanted = frozenset(result.options.parts)
    heads = wanted & {"vggt", "adapter"}
    runs: dict[str, Callable[[], list[Figure]]] = {
        "vae": lambda: vae_part(context),
        "allview": lambda: allview_part(context),
        "2view": lambda: two_view_part(context),
        "1view": lambda: one_view_part(context),
        "moves": asked_moves,
        "text": swapped_text,
    }
    for part in PARTS:
        if part in runs and part in wanted:
            yield part, runs[part]
        elif part == "vggt" and heads:
            yield ", ".join(sorted(heads, reverse=True)), lambda: geometry_parts(context, heads)


def _rows(context: Context) -> list[Row]:
    """Scene by scene the truth, and what every part made of it, for the contact sheet."""
    rows = []
    for n in range(min(SHOWN, len(context.clips))):
        rows.append(Row(f"scene {n}", context.clips.rgb[n].cpu().numpy()))
        rows.append(Row("true depth", depth_colors(context.true_depth[n].numpy())))
        for part, (rgb, depth) in context.kept.items():
            if rgb is not None:
                rows.append(Row(part, rgb[n].numpy()))
            if depth is not None:
                rows.append(Row(f"{part} depth", depth_colors(depth[n].float().numpy())))
    return rows
