"""What a run leaves to look at: metrics.jsonl, TensorBoard events, validation videos.

``OUTPUT/metrics.jsonl`` has one line per step, whatever the report; ``OUTPUT/validation/step-N/``
the videos as MP4; ``OUTPUT/tensorboard/`` scalars, texts and the videos as animated images.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from gen3r.writers import FRAME_RATE, save_video

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from gen3r_training.stages import ValidationResult

METRICS = "metrics.jsonl"
GIF_SIDE = 280  # pixels: the longer side of the animated images, which have 256 colours only


def require_report(report: str) -> None:
    """Raise ValueError when `report` needs a package that is not installed."""
    if report == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "--report tensorboard needs the package tensorboard: "
            "pip install 'gen3r-engine[train]', or use --report none"
        )


class Report:
    """Writes the files of one run; on ranks other than the main one (`active` off) nothing.

    Parameters
    ----------
    first : finished steps at the start; what a run before it wrote about later ones goes
    """

    def __init__(self, output: Path, report: str, first: int, *, active: bool = True) -> None:
        self.active, self._output = active, output
        self._events: SummaryWriter | None = None
        if not active:
            return
        output.mkdir(parents=True, exist_ok=True)
        truncate_metrics(output / METRICS, first)
        self._metrics = open(output / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        if report == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                output / "tensorboard", purge_step=first + 1 if first else None, flush_secs=30
            )

    def step(self, finished: int, values: Mapping[str, float | bool]) -> None:
        """One line of numbers by name; one that is not finite is null there."""
        if not self.active:
            return
        line = {"step": finished, **{name: _plain(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"train/{name}", float(value), finished)

    def validation_folder(self, finished: int) -> Path:
        """Where the files of a validation go; made on the main rank."""
        folder = self._output / "validation" / f"step-{finished:08d}"
        if self.active:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def validation(self, finished: int, result: ValidationResult) -> None:
        """Scalars, videos and text of a validation."""
        if not self.active:
            return
        folder = self.validation_folder(finished)
        for name, video in result.videos.items():
            save_video(video.cpu(), folder / f"{name.replace('/', '-')}.mp4")
        facts = {"scalars": {n: _plain(v) for n, v in result.scalars.items()}, "text": result.text}
        (folder / "validation.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        if self._events is None:
            return
        for name, value in result.scalars.items():
            self._events.add_scalar(f"validation/{name}", value, finished)
        if result.text:
            self._events.add_text("validation/text", result.text, finished)
        for name, video in result.videos.items():
            self._add_video(f"validation/{name}", video, finished)
        self._events.flush()

    def close(self) -> None:
        """Write out what is pending."""
        if not self.active:
            return
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def _add_video(self, name: str, video: Tensor, finished: int) -> None:
        """TensorBoard plays GIFs in its image view; torch's add_video needs moviepy for that."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data, width, height = gif(video)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        if self._events is not None and self._events.file_writer is not None:
            self._events.file_writer.add_summary(summary, finished)


def gif(
    video: Tensor,  # uint8 [F, H, W, 3]
) -> tuple[bytes, int, int]:  # the file, width, height
    """The video as an endless GIF, made smaller where its longer side is above `GIF_SIDE`."""
    images = [Image.fromarray(frame.numpy()) for frame in video.cpu()]
    scale = min(1.0, GIF_SIDE / max(images[0].size))
    width, height = (max(1, round(side * scale)) for side in images[0].size)
    images = [image.resize((width, height)) for image in images]
    stream = io.BytesIO()
    images[0].save(
        stream,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / FRAME_RATE),
        loop=0,
    )
    return stream.getvalue(), width, height


def truncate_metrics(path: Path, finished: int) -> None:
    """Cut off the lines after step `finished`, and a line that a killed run left half written."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb+") as stream:
        for line in stream:
            if _step_of(line) > finished:
                break
            end += len(line)
        stream.truncate(end)


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int):
        return value
    return float(value) if math.isfinite(value) else None
