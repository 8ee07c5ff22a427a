"""What goes from stage to stage: batches of requests, how they are sampled, what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen3r.run import Progress, Run
from gen3r.scene import SceneRequest
from gen3r.schedulers import Schedule
from gen3r.transformer import Conditions, RawConditions
from gen3r_engine.denoiser import Cancelled
from gen3r_engine.events import SceneError
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.memory import OutOfMemory
from gen3r_engine.streams import HostCopy

if TYPE_CHECKING:
    from gen3r_engine.fusion_cuda import FusedTensors


@dataclass(frozen=True)
class Sampling:
    """How the scenes of one call are sampled.

    fusion : how the points become one cloud; None: they are left as they are.
    latents [N, 16, f, h, 2 w], posterior_noise [N, 16, f, h, w] : noise of all N requests, in place
        of what their seeds give; for tests and comparisons.
    """

    schedule: Schedule
    guidance: float
    point_maps: bool = False
    fusion: FusionConfig | None = None
    latents: Tensor | None = None
    posterior_noise: Tensor | None = None

    @property
    def guided(self) -> bool:
        return self.guidance > 1


@dataclass(frozen=True)
class Batch:
    """Requests that go through the denoising loop together.

    indices : their positions in the call. report : progress of the request at a position.
    half : it is one half of a batch that did not fit.
    """

    indices: tuple[int, ...]
    requests: tuple[SceneRequest, ...]
    device: torch.device
    report: Callable[[int], Progress] | None = None
    half: bool = False
    run: Run = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", self.run_of(0))

    def run_of(self, row: int) -> Run:
        """Book-keeping of one scene; the batch's own goes under its first scene."""
        report = None if self.report is None else self.report(self.indices[row])
        return Run(self.device, report)

    def halves(self) -> list[Batch]:
        """Two batches of half the size."""
        middle = (len(self.indices) + 1) // 2
        return [
            Batch(self.indices[part], self.requests[part], self.device, self.report, half=True)
            for part in (slice(middle), slice(middle, None))
        ]


@dataclass
class Encoded:
    """What the denoising loop takes: conditions (R rows) and noise [n, 16, f, h, 2 w] float32.

    The conditions are as they were encoded where an exported plan projects them.
    """

    conditions: Conditions | RawConditions
    noise: Tensor


@dataclass
class Decoded:
    """One scene on its way to the host."""

    batch: Batch
    row: int
    copy: HostCopy
    run: Run  # of this scene's decoding
    fusion: FusionConfig | None  # how the points become a cloud
    fused: FusedTensors | None  # the cloud, where the GPU made it
    plans: dict[str, dict[str, str]] | None = None  # what ran from exported plans


@contextmanager
def failing(indices: tuple[int, ...], stage: str) -> Iterator[None]:
    """Errors inside become a `SceneError`; memory, cancelling and Ctrl-C stay what they are."""
    try:
        yield
    except (OutOfMemory, torch.cuda.OutOfMemoryError) as error:
        error.add_note(f"while working on request {', '.join(map(str, indices))}")
        raise
    except (Cancelled, SceneError):
        raise
    except Exception as error:
        raise SceneError(indices, stage, error) from error
