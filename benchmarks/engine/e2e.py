"""Whole scenes: the stages of one, and several through `Engine.stream`.

gen3r-engine bench --suite e2e --preset exact
gen3r-engine bench --suite e2e --preset fp8 -- --scenes 4 --solo_steps 10
gen3r-engine bench --suite e2e -- --model nano --frames 5 --steps 2 --scenes 2

First one scene alone, of --solo_steps steps: its stages, its step, its energy. Then --scenes scenes
of --steps steps through the stream: stream_<scenes> is the time from the call to the last scene on
the host, and `over_loops_and_decode` in its config is that time over (scenes x steps x the solo
step + one solo decode): 1 means that nothing but the loops and the last decode took time. The plain
pipeline (eager) has no stream.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks.energy import Meter
from benchmarks.engine.common import GUIDANCE, Options, Provider, Rows, parser, resolve_options
from benchmarks.engine.scenes import Runner, Solo, loaded, requests_for, solo, solo_rows
from benchmarks.pipeline import check
from gen3r_engine.fusion import FusionConfig

SCENES, SOLO_STEPS = 4, 10
DECODE = ("decode appearance", "decode geometry", "fuse")


def measure(provider: Provider, options: Options, rows: Rows, meter: Meter) -> None:
    """All rows of a provider."""
    with loaded(provider, options) as runner:
        alone = solo(runner, options, options.arguments.solo_steps)
        solo_rows(rows, provider, alone, options.arguments.solo_steps)
        if runner.engine is not None and options.arguments.scenes:
            stream(runner, options, rows, meter, alone)


def stream(runner: Runner, options: Options, rows: Rows, meter: Meter, alone: Solo) -> None:
    """The rows of several scenes through the stream."""
    engine, name, count = runner.engine, runner.provider.name, options.arguments.scenes
    assert engine is not None
    requests = requests_for(options, count)
    joules, start = meter.read(), time.perf_counter()
    finished, denoise = list[float](), list[float]()
    scenes = engine.stream(requests, steps=options.steps, guidance=GUIDANCE, fusion=FusionConfig())
    for scene in scenes:
        finished.append(time.perf_counter() - start)
        check(scene, options.frames, options.size)
        denoise.append(scene.info["seconds"].get("denoise", 0.0))
    after = meter.read()
    loops = count * options.steps * statistics.median(alone.step_ms) / 1000
    decode = sum(alone.stages.get(stage, 0.0) for stage in DECODE)
    rows.add(
        *(f"stream_{count}", name, "time", "s", [finished[-1]]),
        steps=options.steps,
        finished=finished,
        denoise=denoise,
        loops_alone=loops,
        decode_alone=decode,
        over_loops_and_decode=finished[-1] / (loops + decode),
    )
    if joules is not None and after is not None:
        energy = (after - joules) / count
        rows.add("scene_total", name, "energy", "J", [energy], steps=options.steps, scenes=count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/e2e.jsonl; 1 if a provider failed."""
    made = parser("e2e", __doc__, ("exact",))
    made.add_argument("--scenes", type=int, default=SCENES, help="in the stream; 0: no stream (4)")
    made.add_argument("--solo_steps", type=int, default=SOLO_STEPS, help="of the solo scene (10)")
    options = resolve_options(made.parse_args(argv))
    rows, meter = Rows("e2e", options), Meter(options.device)
    if meter.why_not is not None:
        print(f"no energy rows: {meter.why_not}", flush=True)
    rows.each(lambda provider: measure(provider, options, rows, meter))
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
