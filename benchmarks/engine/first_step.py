"""One process from its start to its first finished denoising step; prints when what was done.

Started by the suite `startup`, which passes the moment of the start in seconds since the epoch:

    python -m benchmarks.engine.first_step --started "$(date +%s.%N)" --preset exact
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RESULT = "FIRST STEP "


def main(argv: Sequence[str] | None = None) -> int:
    """Load, encode, run one step, print the seconds since the start as JSON, and stop."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--started", type=float, required=True)
    made.add_argument("--checkpoint", help="default: the embedded model")
    made.add_argument("--config", default="{}", help="fields of EngineConfig as JSON")
    made.add_argument("--frames", type=int, required=True)
    made.add_argument("--size", type=int, required=True)
    options = made.parse_args(argv)
    # Imported here: importing is part of what is measured.
    import numpy as np

    from gen3r_engine import Engine, EngineConfig, SceneRequest
    from gen3r_engine.denoiser import Cancelled
    from gen3r_engine.events import Event

    marks = {"imports": time.time() - options.started}
    values = json.loads(options.config)
    if values.get("cache_dir") is not None:
        values["cache_dir"] = Path(values["cache_dir"])
    engine = Engine.load(options.checkpoint, EngineConfig(**values))
    marks["loaded"] = time.time() - options.started

    def on_event(event: Event) -> None:
        if event.stage == "denoise" and event.done == 0:
            marks.setdefault("encoded", time.time() - options.started)
        if event.stage == "denoise" and event.done == 1:
            marks.setdefault("first step", time.time() - options.started)
            engine.cancel()

    size = (2, options.size, options.size, 3)
    views = list(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    request = SceneRequest(
        views,
        "an old stone arena with many arches under a sunny sky",
        num_frames=options.frames,
        height=options.size,
        width=options.size,
    )
    shape = (options.frames, options.size, options.size, 1)
    cache = engine.warmth.before(shape)
    with contextlib.suppress(Cancelled):
        engine.generate(request, steps=2, on_event=on_event)
    # A run that is stopped after its first step takes no note of what it compiled.
    engine.warmth.done(shape, {})
    print(RESULT + json.dumps({"seconds": marks, "cache": cache}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
