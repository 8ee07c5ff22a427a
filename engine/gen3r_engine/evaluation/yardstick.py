"""The yardstick: what each preset and knob costs in quality, and what it saves in time.

Every row is the same held-out scenes from the same noise, made another way. It is compared with the
exact preset (the error that the knob adds) and with the truth (what is left of the quality); exact
with another seed shows how far two equally good results are apart.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gen3r.scene import SceneRequest
from gen3r_engine.config import EngineConfig
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation.batches import Generated
from gen3r_engine.evaluation.figures import Figure
from gen3r_engine.evaluation.held_out import SEED, held_out, requests
from gen3r_engine.evaluation.knobs import Knob, load_engine
from gen3r_engine.evaluation.record import environment, model_facts, numerics
from gen3r_engine.evaluation.sampling import Sampler
from gen3r_engine.evaluation.yardstick_figures import to_exact, to_truth
from gen3r_engine.presets import device_facts
from gen3r_kernels.backends import ATTENTION_BACKENDS
from gen3r_training.procedural import Clips

Told = Callable[[str, int, int], None]
TASKS = ("1view", "2view", "allview")
WARM_UP_STEPS = 3
REFERENCE = Knob("exact")


@dataclass(frozen=True)
class YardstickOptions:
    """What is compared, on which scenes.

    Parameters
    ----------
    checkpoint : folder or hub id; None: the embedded model.
    config : of the reference, and of all rows but for what a knob changes; it is exact.
    scenes, frames, size : of the clips; None: the model's own frames and size.
    steps, guidance, solver : of the reference. batch : scenes at once.
    tasks : of `TASKS`. seed : of the clips.

    Raises
    ------
    ValueError : an unknown task, fewer than one scene or step, or a config that is not exact: its
        preset, an attention backend of 8 bits, an encoder in another precision than the model's.
    """

    checkpoint: str | None
    config: EngineConfig
    scenes: int = 16
    frames: int | None = None
    size: int | None = None
    steps: int = 50
    guidance: float | None = None
    solver: str = "euler"
    batch: int = 8
    tasks: tuple[str, ...] = TASKS
    seed: int = SEED

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"task '{''.join(unknown[:1])}' is unknown; known: {', '.join(TASKS)}")
        for name in ("scenes", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1; use 1 or more")
        self._check_reference()

    def _check_reference(self) -> None:
        config, backend = self.config, ATTENTION_BACKENDS.get(self.config.attention)
        changed = []  # what was asked, and the knob that is it
        if config.preset != "exact":
            changed.append((f"preset {config.preset}", config.preset))
        if backend is not None and not backend.exact:
            changed.append((f"attention {backend.name}", f"attention {backend.name}"))
        if config.encoder_precision != "model":
            precision = config.encoder_precision
            changed.append((f"encoder precision {precision}", f"encoder {precision}"))
        if changed:
            asked, knob = changed[0]
            raise ValueError(
                f"{asked} cannot be the reference of the yardstick, which is the exact preset as "
                f"it is; leave it out and compare it as a row: knob '{knob}'"
            )


@dataclass(frozen=True)
class YardstickRow:
    """What a knob does.

    problem : why it was not measured, empty where it was.
    to_exact, to_truth : figures; seconds : of one scene in a batch, without compiling and
    capturing, by stage. dtype, numerics : of its engine, see `record.numerics`.
    """

    knob: Knob
    problem: str = ""
    to_exact: tuple[Figure, ...] = ()
    to_truth: tuple[Figure, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    numerics: dict[str, Any] = field(default_factory=dict)

    @property
    def scene_seconds(self) -> float:
        """Of one scene, all stages."""
        return sum(self.seconds.values())


@dataclass
class Yardstick:
    """All rows, the reference first, and where and of what they were made."""

    options: YardstickOptions
    shape: tuple[int, int, int] = (0, 0, 0)  # frames, height, width
    guidance: float = 0.0
    rows: list[YardstickRow] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        options = {k: v for k, v in asdict(self.options).items() if k != "config"}
        return {"settings": options, **self.facts, "rows": [row_dict(row) for row in self.rows]}


def row_dict(row: YardstickRow) -> dict[str, Any]:
    """A row as plain JSON values."""
    return {
        "name": row.knob.name,
        "problem": row.problem,
        "to_exact": [figure.to_dict() for figure in row.to_exact],
        "to_truth": [figure.to_dict() for figure in row.to_truth],
        "seconds": row.seconds,
        "dtype": row.dtype,
        **row.numerics,
    }


def run_yardstick(
    options: YardstickOptions,
    knobs: Sequence[Knob],
    told: Told | None = None,
    commit: str | None = None,
) -> Yardstick:
    """Measure the reference (exact as `options` says) and every knob.

    One engine a config, one after the other: only one model is in memory. A knob that cannot be had
    here gives a row that says so.

    Raises
    ------
    ValueError, CheckpointError : the reference itself cannot be made.
    """
    told = told or (lambda stage, done, total: None)
    run = _Run(options, told)
    found = Yardstick(options)
    rows = {REFERENCE.name: run.measure(REFERENCE, found, commit)}
    knobs = [knob for knob in knobs if not _same(knob, found)]
    here = [knob for knob in knobs if not knob.problem(run.cuda)]
    # Knobs of one engine one after the other: it is loaded once.
    keys = list(dict.fromkeys(knob.engine_key(options.config) for knob in here))
    order = sorted(here, key=lambda knob: keys.index(knob.engine_key(options.config)))
    told("knobs", 0, len(order))
    for done, knob in enumerate(order, start=1):
        rows[knob.name] = run.attempt(knob, found)
        told("knobs", done, len(order))
    for knob in knobs:
        rows.setdefault(knob.name, YardstickRow(knob, knob.problem(run.cuda)))
    run.unload()
    found.rows = [rows[name] for name in (REFERENCE.name, *(knob.name for knob in knobs))]
    return found


def _same(knob: Knob, found: Yardstick) -> bool:
    """Whether the knob is as the reference has it."""
    model, options = found.facts["model"], found.options
    have = {"steps": options.steps, "guidance": found.guidance, "solver": options.solver}
    config = {name: value == model.get(name) for name, value in knob.config.items()}
    plain = knob.noise == 0 and knob.precision is None and not knob.reference
    return plain and all(config.values()) and have == {**have, **knob.sampling}


class _Run:
    """Holds the clips, the reference's results, and one engine at a time."""

    def __init__(self, options: YardstickOptions, told: Told) -> None:
        self.options, self.told = options, told
        self.device = device_facts(options.config).device
        self.cuda = self.device.type == "cuda"
        self._engine: Engine | None = None
        self._loaded: object = None
        self._warm: set[str] = set()
        self._clips: Clips | None = None
        self._reference: dict[str, Generated] = {}

    def unload(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._loaded = None
        self._warm.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def attempt(self, knob: Knob, found: Yardstick) -> YardstickRow:
        """The knob's row; one that this machine or model refuses says why."""
        try:
            return self.measure(knob, found)
        except (ValueError, RuntimeError) as error:
            self.unload()
            text = str(error).strip() or type(error).__name__
            return YardstickRow(knob, text.splitlines()[0])

    def measure(self, knob: Knob, found: Yardstick, commit: str | None = None) -> YardstickRow:
        """The knob's row; the first one becomes the reference and fills in the facts."""
        engine = self._load(knob)
        clips = self._held_out(engine)
        if not self._reference:
            self._record(engine, clips, found, commit)
        sampling: dict[str, Any] = {
            "steps": self.options.steps,
            "guidance": self.options.guidance,
            "solver": self.options.solver,
            **knob.sampling,
        }
        asked = {task: requests(clips, task, noise=knob.noise) for task in self.options.tasks}
        self._warm_up(engine, sampling, asked)
        sampler = Sampler(engine, self.options.batch, **sampling)
        made = {}
        for task, members in asked.items():
            made[task] = sampler.generate(members)
        self._reference = self._reference or made
        count = len(asked) * len(clips)
        seconds = {k: v / count for k, v in sampler.seconds.items() if k != "prepare"}
        against = () if made is self._reference else to_exact(made, self._reference)
        truth = to_truth(made, clips)
        own = engine.choice.dtype, numerics(engine)
        return YardstickRow(knob, "", against, truth, seconds, *own)

    def _record(self, engine: Engine, clips: Clips, found: Yardstick, commit: str | None) -> None:
        """Where and of what the reference is made."""
        frames, height, width = clips.rgb.shape[1:4]
        found.shape = frames, height, width
        own, options = engine.pipeline.config, self.options
        found.guidance = own.guidance_scale if options.guidance is None else options.guidance
        found.facts = {
            "model": model_facts(engine, options.checkpoint),
            "environment": environment(self.device, commit),
        }

    def _load(self, knob: Knob) -> Engine:
        wanted = knob.engine_key(self.options.config)
        if self._engine is None or wanted != self._loaded:
            self.unload()
            self._engine = load_engine(self.options.checkpoint, self.options.config, knob)
            self._loaded = wanted
        return self._engine

    def _held_out(self, engine: Engine) -> Clips:
        if self._clips is None:
            own, options = engine.pipeline.config, self.options
            self.told("clips", 0, 1)
            self._clips = held_out(
                range(options.scenes),
                seed=options.seed,
                frames=own.num_frames if options.frames is None else options.frames,
                size=own.size if options.size is None else options.size,
                device=self.device,
            )
            self.told("clips", 1, 1)
        return self._clips

    def _warm_up(
        self, engine: Engine, sampling: dict[str, Any], asked: dict[str, list[SceneRequest]]
    ) -> None:
        """A GPU's first batch loads kernels and plans convolutions: it is not timed."""
        if not self.cuda or sampling["solver"] in self._warm:
            return
        self._warm.add(sampling["solver"])
        for members in asked.values():
            few = {**sampling, "steps": min(WARM_UP_STEPS, sampling["steps"])}
            Sampler(engine, self.options.batch, **few).generate(members[: self.options.batch])
