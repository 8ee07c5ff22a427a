"""The presets and knobs that change a scene or its time, as rows of the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from gen3r.config import ENCODER_PRECISIONS
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r.precision import Precision, apply_precision
from gen3r.schedulers import SOLVERS
from gen3r_engine.config import DTYPES, TIERS, EngineConfig
from gen3r_engine.engine import Engine
from gen3r_engine.evaluation.held_out import ANOTHER
from gen3r_engine.presets import device_facts
from gen3r_kernels import Backends
from gen3r_kernels.backends import ATTENTION_BACKENDS

STEPS = (50, 30, 20, 10)
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.0)


@dataclass(frozen=True)
class Knob:
    """One change of the reference.

    name : of the row. config : changes of `EngineConfig`. sampling : of steps, solver and
    guidance. noise : first seed of the scenes' noise. precision : put onto the transformer once it
    is loaded. reference : the operators are plain PyTorch, which take models that the kernels do
    not. cuda : it needs a GPU.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    noise: int = 0
    precision: Precision | None = None
    reference: bool = False
    cuda: bool = False

    def engine_key(self, config: EngineConfig) -> tuple[object, ...]:
        """What an engine must be loaded anew for; config : of the reference."""
        return replace(config, **self.config), self.precision, self.reference

    @property
    def settings(self) -> dict[str, Any]:
        """All that the knob sets, as plain JSON values."""
        own: dict[str, Any] = {**self.sampling, **self.config}
        if self.precision is not None:
            own["precision"] = asdict(self.precision)
        if self.reference:
            own["operators"] = "reference"
        return own

    def problem(self, cuda: bool) -> str:
        """Why it cannot be had here; empty where it may."""
        return "needs a GPU" if self.cuda and not cuda else ""


def all_knobs(config: EngineConfig) -> list[Knob]:
    """Every knob that there is. config : of the reference; knobs name what differs from it."""
    knobs = [Knob("another seed", noise=ANOTHER)]
    fp8: dict[str, Any] = {"preset": "fp8"}
    knobs.append(Knob("fp8", fp8, cuda=True))
    # The kernel for 8-bit scores takes heads of 128 channels alone: for a model with others its row
    # says so, and what remains are the products, and the whole preset with plain operators.
    products = Precision(linears="fp8")
    knobs.append(Knob("fp8 products alone", precision=products, cuda=True))
    plain = {**fp8, "captured": False, "compiled": False}
    knobs.append(Knob("fp8, plain operators", plain, reference=True, cuda=True))
    knobs += [Knob(d, {"dtype": d}) for d in DTYPES]
    knobs += [
        Knob(f"attention {b.name}", {"attention": b.name}, cuda=b.cuda_only)
        for b in ATTENTION_BACKENDS.values()
        if not b.exact
    ]
    knobs += [
        Knob(f"encoder {p}", {"encoder_precision": p})
        for p in ENCODER_PRECISIONS
        if p != config.encoder_precision
    ]
    knobs += [Knob(t, {"residency": t}, cuda=True) for t in TIERS[1:]]
    name = "not compiled" if config.compiled else "compiled"
    knobs.append(Knob(name, {"compiled": not config.compiled}, cuda=True))
    knobs += [
        Knob(f"{solver} {n}", sampling={"solver": solver, "steps": n})
        for solver in SOLVERS
        for n in STEPS
    ]
    knobs += [Knob(f"guidance {g:g}", sampling={"guidance": g}) for g in GUIDANCE]
    return knobs


def load_engine(checkpoint: str | None, config: EngineConfig, knob: Knob) -> Engine:
    """The engine of a row. config : of the reference. Raises as `Engine.load`."""
    config = replace(config, **knob.config)
    if knob.reference:
        return Engine.of(_plain_pipeline(checkpoint, config), config)
    engine = Engine.load(checkpoint, config)
    if knob.precision is not None:
        apply_precision(engine.pipeline.transformer, knob.precision)
    return engine


def _plain_pipeline(checkpoint: str | None, config: EngineConfig) -> Gen3RPipeline:
    device = device_facts(config).device
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    backends = Backends(operators="reference")
    if checkpoint is None:
        return build_nano(dtype, device, backends)
    return Gen3RPipeline.from_pretrained(
        checkpoint,
        torch_dtype=dtype,
        device=device,
        backends=backends,
        allow_pickle=config.allow_pickle,
    )


def choose(knobs: Sequence[Knob], patterns: Sequence[str]) -> list[Knob]:
    """The knobs that one of the patterns (* and ?) names, in their order.

    Raises
    ------
    ValueError : a pattern that names none; the text lists them.
    """
    for pattern in patterns:
        if not any(fnmatchcase(knob.name, pattern) for knob in knobs):
            known = ", ".join(knob.name for knob in knobs)
            raise ValueError(f"knob '{pattern}' is unknown; known: {known}")
    return [k for k in knobs if any(fnmatchcase(k.name, pattern) for pattern in patterns)]
