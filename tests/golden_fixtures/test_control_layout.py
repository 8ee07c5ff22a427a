"""control_layout: task masks and the camera packing."""

from __future__ import annotations

from gen3r import conditioning
from tests.golden_fixtures.golden import Golden

KIND = "control_layout"


def test_masks(golden: Golden) -> None:
    num_frames = golden["control_cameras"].shape[1]
    for task in golden.cases(r"mask_(\w+)"):
        height, width = golden[f"mask_{task}"].shape[-2:]
        golden.check(f"mask_{task}", conditioning.task_mask([task], num_frames, height, width // 2))


def test_camera_latents(golden: Golden) -> None:
    golden.check("control_camera_latents", conditioning.camera_latents(golden["control_cameras"]))
