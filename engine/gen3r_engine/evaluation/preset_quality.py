"""How good a checkpoint's scenes are in one preset: what ``verify --yardstick`` prints."""

from __future__ import annotations

from dataclasses import replace

from gen3r.run import Progress
from gen3r_engine.config import EngineConfig
from gen3r_engine.evaluation.held_out import ANOTHER
from gen3r_engine.evaluation.knobs import Knob
from gen3r_engine.evaluation.yardstick import Yardstick, YardstickOptions, run_yardstick


def held_out_quality(
    checkpoint: str | None,
    config: EngineConfig,
    *,
    scenes: int,
    frames: int | None = None,
    size: int | None = None,
    steps: int = 50,
    guidance: float | None = None,
    told: Progress | None = None,
) -> Yardstick:
    """The yardstick of one config: the exact preset, exact with another seed, and the config.

    On `scenes` held-out procedural scenes rendered at the model's frames and size (or those given),
    from one view and from all views, one scene at a time. The config has a row of its own where its
    preset, dtype, attention or encoder precision is another than the exact preset's default.

    Raises
    ------
    CheckpointError, ValueError : as `Engine.load`, and fewer than one scene.
    """
    reference = replace(
        config, preset="exact", dtype=None, attention="auto", encoder_precision="model"
    )
    changed = {
        name: getattr(config, name)
        for name in ("preset", "dtype", "attention", "encoder_precision")
        if getattr(config, name) != getattr(reference, name)
    }
    knobs = [Knob("another seed", noise=ANOTHER)]
    if changed:
        knobs.append(Knob(" ".join(str(value) for value in changed.values()), config=changed))
    options = YardstickOptions(
        checkpoint,
        reference,
        scenes=scenes,
        frames=frames,
        size=size,
        steps=steps,
        guidance=guidance,
        batch=1,
        tasks=("1view", "allview"),
    )
    return run_yardstick(options, knobs, told)
