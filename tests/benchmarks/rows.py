"""Rows to try reports and comparisons on."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Environment, Measurement, Row, make_row

WHERE = Environment(
    gpu="NVIDIA Test GPU",
    capability="9.0",
    driver="1.2",
    torch="2.11.0",
    triton="3.6.0",
    commit="0123456789ab",
    utc="2026-01-02T03:04:05Z",
)
WORK = {"bytes": 2_000_000_000, "flops": 4_000_000_000}


def row(
    case: str = "unproject",
    provider: str = "gen3r",
    metric: str = "time",
    unit: str = "ms",
    samples: tuple[float, ...] = (1.0,),
    where: Environment = WHERE,
    **options: Any,
) -> Row:
    return make_row(
        "kernels",
        Measurement(case, provider, "2x3", "float32", metric, unit, samples, **options),
        where,
    )


def kernel_rows() -> list[Row]:
    """Two ceilings, and one case with two providers."""
    return [
        row("ceiling", "copy", "gbps", "GB/s", (2800.0,)),
        row("ceiling", "bf16", "tflops", "TFLOP/s", (740.0,)),
        row(provider="eager", samples=(4.0, 4.1, 4.2), rel_error=1e-3, config=dict(WORK)),
        row(samples=(0.9, 1.0, 1.1), rel_error=2e-3, config=dict(WORK)),
        row(metric="gbps", unit="GB/s", samples=(2000.0,), share_of_ceiling=2000 / 2800),
        row(metric="memory", unit="GiB", samples=(0.5,)),
        row(unit="s", samples=(3.25,), config={"phase": "compile"}),
    ]
