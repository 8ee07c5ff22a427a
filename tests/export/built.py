"""What must hold of plans that TensorRT-RTX built, and a line that says how many there are."""

from __future__ import annotations

from collections.abc import Sequence

from gen3r_export.manifest import Entry
from gen3r_export.tensorrt_library import RTX_CAPABILITIES


def check_plans(files: Sequence[Entry], plans: Sequence[Entry]) -> None:
    """Every ONNX file has a plan for every capability, with layers as its precision says."""
    assert len(plans) == len(files) * len(RTX_CAPABILITIES)
    for plan in plans:
        assert plan.checked["layers"] == "passed", (plan.name, plan.checked)
        assert plan.gpu is not None and plan.gpu.capability in RTX_CAPABILITIES
        assert plan.bytes > 0


def told(model: str, files: Sequence[Entry], plans: Sequence[Entry]) -> str:
    """How many plans of how many graphs."""
    return (
        f"TensorRT-RTX, {model}: {len(plans)} plans built of {len(files)} graphs for SM "
        f"{', '.join(RTX_CAPABILITIES)}; none skipped"
    )
