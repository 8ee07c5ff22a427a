"""Peak GPU memory of a whole scene, and what a memory tier costs in time.

gen3r-engine bench --suite memory --preset eager exact fp8 24gb
gen3r-engine bench --suite memory -- --model nano --frames 5 --steps 2

Every provider builds its model anew and makes a scene of a few steps twice. peak_memory is what the
process must have at once: the larger of the first scene's allocations, during which the step is
captured, and the second's plus what the captured step keeps for itself. `reserved_gib` in its
config is what the allocator took from the GPU. The tier's visits show in the stages' times. A CPU
has no such figures; there only times come out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.engine.common import Options, Provider, Rows, parser, resolve_options
from benchmarks.engine.scenes import loaded, solo, solo_rows

STEPS = 4


def measure(provider: Provider, options: Options, rows: Rows) -> None:
    """All rows of a provider."""
    with loaded(provider, options) as runner:
        found = solo(runner, options, options.steps)
    solo_rows(rows, provider, found, options.steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/memory.jsonl; 1 if a provider failed."""
    made = parser("memory", __doc__, ("exact", "fp8", "24gb"))
    made.set_defaults(steps=STEPS)
    options = resolve_options(made.parse_args(argv))
    rows = Rows("memory", options)
    rows.each(lambda provider: measure(provider, options, rows))
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
