"""What a running training shows, with a clock of the test's own."""

from __future__ import annotations

import io

import pytest
import torch

from gen3r_training.progress import Mean, TrainProgress, Work, clock_time, rate

CPU = torch.device("cpu")
WORK = Work(first=0, total=40, steps_per_epoch=10, epochs=4, flops=3e12, peak=1e13)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines_of(seconds: list[float], work: Work = WORK) -> list[str]:
    now = [0.0]
    stream = io.StringIO()
    progress = TrainProgress(work, CPU, stream=stream, clock=lambda: now[0])
    with progress:
        for index, duration in enumerate(seconds):
            now[0] += duration
            progress.step(work.first + index + 1, 2.0, duration)
    return stream.getvalue().splitlines()


def test_plain_lines_come_every_ten_seconds_and_at_the_end() -> None:
    lines = lines_of([1.0] * 40)
    assert [line.split("  ")[1] for line in lines] == [
        f"step {step}/40" for step in (1, 11, 21, 31, 40)
    ]
    place, step, loss, speed, mfu, memory, left = lines[1].split("  ")
    assert (place, step, loss) == ("epoch 2/4", "step 11/40", "loss 2")
    assert (speed, mfu, left) == ("1.00 it/s", "MFU 30.0 %", "ETA 0:00:29")
    assert float(memory.removesuffix(" GiB")) > 0


def test_without_a_known_peak() -> None:
    unknown = Work(first=0, total=40, steps_per_epoch=10, epochs=4, flops=3e12, peak=None)
    assert "MFU -" in lines_of([1.0], unknown)[0]


def test_a_skipped_step_leaves_the_loss() -> None:
    stream = io.StringIO()
    progress = TrainProgress(WORK, CPU, stream=stream, clock=lambda: 100.0)
    progress.step(1, None, 2.0)
    assert "loss -" in stream.getvalue() and "2.00 s/it" in stream.getvalue()
    progress.step(2, 3.0, 2.0)
    progress.step(3, None, 2.0)
    assert progress.loss.value == 3.0


def test_terminal_has_a_bar_and_lines_above_it() -> None:
    stream = Terminal()
    with TrainProgress(WORK, CPU, stream=stream) as progress:
        progress.step(20, 0.125, 0.5)
        progress.say("saved step-00000020")
    shown = stream.getvalue()
    for text in ("epoch 2/4", "step 20/40", "loss 0.125", "2.00 it/s", "MFU 60.0 %", "ETA 0:00:10"):
        assert text in shown
    assert "saved step-00000020" in shown


def test_other_ranks_are_silent() -> None:
    stream = Terminal()
    with TrainProgress(WORK, CPU, shown=False, stream=stream) as progress:
        progress.step(1, 1.0, 1.0)
        progress.say("text")
    assert stream.getvalue() == ""
    assert progress.mfu() == pytest.approx(0.3)


def test_running_mean() -> None:
    mean = Mean(0.5)
    assert mean.value is None
    for value in (4.0, 1.0, 3.0):
        mean.add(value)
    assert mean.value == pytest.approx((0.25 * 4 + 0.5 * 1 + 3) / 1.75)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "4.00 it/s"), (8.2, "8.20 s/it"), (0.0, "- it/s")]
)
def test_rate(seconds: float, text: str) -> None:
    assert rate(seconds) == text


def test_clock_time() -> None:
    assert [clock_time(s) for s in (0, 59.6, 3661, 100_000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "27:46:40",
    ]
