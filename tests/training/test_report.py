"""metrics.jsonl, TensorBoard events as TensorBoard reads them, validation videos."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen3r.media import load_video
from gen3r_training import report
from gen3r_training.report import Report, gif, require_report, truncate_metrics
from gen3r_training.stages import ValidationResult


def video(frames: int = 5, height: int = 32, width: int = 64) -> torch.Tensor:
    """Grey levels that rise from frame to frame."""
    levels = torch.arange(frames, dtype=torch.uint8) * 40
    return levels[:, None, None, None].expand(frames, height, width, 3).contiguous()


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def write_run(output: Path, kind: str, first: int, last: int) -> None:
    writer = Report(output, kind, first)
    for step in range(first + 1, last + 1):
        writer.step(step, {"loss": step / 4, "lr": 0.5, "grad_norm": math.nan, "skipped": True})
    result = ValidationResult({"error": 0.75}, {"first/rgb": video()}, "a red chair")
    writer.validation(last, result)
    writer.close()


def test_tensorboard_reads_scalars_text_and_video(tmp_path: Path) -> None:
    write_run(tmp_path, "tensorboard", 0, 3)
    events = accumulated(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [(e.step, e.value) for e in events.Scalars("validation/error")] == [(3, 0.75)]
    text = events.Tensors("validation/text/text_summary")[0].tensor_proto
    assert text.string_val[0] == b"a red chair"
    (image,) = events.Images("validation/first/rgb")
    assert (image.step, image.width, image.height) == (3, 64, 32)
    with Image.open(io.BytesIO(image.encoded_image_string)) as opened:
        assert (opened.format, opened.n_frames, opened.info["loop"]) == ("GIF", 5, 0)  # type: ignore[attr-defined]
        opened.seek(3)
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - 120).max() <= 2


def test_resumed_run_hides_later_events(tmp_path: Path) -> None:
    write_run(tmp_path, "tensorboard", 0, 5)
    write_run(tmp_path, "tensorboard", 2, 4)
    events = accumulated(tmp_path / "tensorboard")
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_validation_files(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 1)
    folder = tmp_path / "validation" / "step-00000001"
    facts = json.loads((folder / "validation.json").read_text())
    assert facts == {"scalars": {"error": 0.75}, "text": "a red chair"}
    frames = load_video(folder / "first-rgb.mp4")
    assert len(frames) == 5 and frames[0].shape == (32, 64, 3)
    assert abs(int(frames[4].mean()) - 160) <= 2
    assert not (tmp_path / "tensorboard").exists()


def test_metrics_lines(tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A number that JSON has no word for is null.
    assert lines[1] == {"step": 2, "loss": 0.5, "lr": 0.5, "grad_norm": None, "skipped": True}


@pytest.mark.parametrize(("finished", "kept"), [(0, 0), (2, 2), (9, 3)])
def test_truncated_to_the_resumed_step(tmp_path: Path, finished: int, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')  # killed while writing
    truncate_metrics(path, finished)
    assert path.read_text() == "".join(lines[:kept])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = Report(tmp_path / "out", "tensorboard", 0, active=False)
    writer.step(1, {"loss": 1.0})
    writer.validation(1, ValidationResult({}, {"video": video()}, ""))
    writer.close()
    assert not (tmp_path / "out").exists()


def test_large_videos_become_smaller_images() -> None:
    data, width, height = gif(video(2, 280, 560))
    assert (width, height) == (280, 140)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (280, 140)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_report("tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gen3r-engine\[train\]") as caught:
        require_report("tensorboard")
    assert "\n" not in str(caught.value)
    require_report("none")
    assert report.METRICS == "metrics.jsonl"
