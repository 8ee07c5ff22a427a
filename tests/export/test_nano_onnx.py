"""The embedded model from ONNX files in onnxruntime equals the plain pipeline, end to end.

The same files are built into plans by TensorRT-RTX, which needs no GPU for that; what concerns
running plans is in `tests/export/test_tensorrt_run.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gen3r.nano import build_nano
from gen3r.scene import SceneRequest
from gen3r_engine import Engine, EngineConfig
from gen3r_export.compare import BOUNDS, relative_error
from gen3r_export.parts import PART_NAMES
from gen3r_export.selftest import FAILED, PASSED, check_folder
from gen3r_export.tensorrt_library import RTX_CAPABILITIES
from tests.export.built import check_plans, told
from tests.export.nano import FRAMES, SIZE, nano_plans, of_format

BOUND = 1e-3
GRAPHS = len(PART_NAMES) + 1  # the denoiser has two
NOT_IN_A_SCENE = "adapter_encoder"


@pytest.mark.slow
def test_every_part_is_exported_and_equals_pytorch() -> None:
    _, exports = nano_plans()
    assert not exports.failed
    files = of_format("onnx")
    assert len(files) == GRAPHS and {entry.part for entry in files} == set(PART_NAMES)
    for entry in files:
        assert entry.checked["onnx.checker"] == "passed"
        assert entry.errors["float32"] <= BOUNDS["fp32"], entry


@pytest.mark.slow
def test_every_part_is_built_for_every_capability(
    record_property: Callable[[str, object], None],
) -> None:
    files, plans = of_format("onnx"), of_format("tensorrt")
    assert {plan.name for plan in plans} == {file.name for file in files}
    check_plans(files, plans)
    record_property("summary", told("NANO", files, plans))


@pytest.mark.slow
def test_a_scene_from_onnx_files() -> None:
    folder, _ = nano_plans()
    engine = Engine.load(None, EngineConfig(device="cpu", plans=folder))
    assert engine.plans is not None and len(engine.plans) == GRAPHS - 1
    refused = [line for line in engine.plans.report if "refused" in line]
    # The plans are a GPU's; each is told.
    assert len(refused) == 1 + GRAPHS * len(RTX_CAPABILITIES)
    photo = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    request = SceneRequest(
        [photo], "a red room", cameras="zoom_in", num_frames=FRAMES, height=SIZE, width=SIZE
    )
    (scene,) = engine.generate(request, steps=3)
    used = dict.fromkeys(set(PART_NAMES) - {NOT_IN_A_SCENE}, "onnx fp32")
    assert scene.info["plans"] == {"used": used, "without": {}}
    (expected,) = build_nano()(requests=[request], num_inference_steps=3)
    for name in ("rgb", "depth", "depth_confidence", "extrinsics", "intrinsics", "points"):
        error = relative_error(getattr(scene, name), getattr(expected, name))
        assert error <= BOUND, (name, error)


@pytest.mark.slow
def test_the_self_test_passes() -> None:
    folder, _ = nano_plans()
    rows = check_folder(folder, None, lambda line: None)
    passed = [row for row in rows if row.verdict == PASSED]
    assert not [row for row in rows if row.verdict == FAILED], rows
    assert len(passed) == GRAPHS
    assert all(row.error is not None and row.error < BOUNDS["fp32"] for row in passed)
