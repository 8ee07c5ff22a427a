"""The training loop of both stages: steps, validation, checkpoints, the finished pipeline.

Where the run stands is one number, the finished optimizer steps: the learning rate, the clip norm
and the samples of every step follow from it (`schedule`, `data.SampleOrder`). A checkpoint holds
the tensors that do not (`TrainState`), so a resumed run repeats the run that was not interrupted
bit for bit on the same devices.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from gen3r_training import checkpoints, schedule
from gen3r_training.agreement import from_all, on_main
from gen3r_training.config import TrainConfig
from gen3r_training.data import SampleOrder, SampleStream
from gen3r_training.flops import peak_flops
from gen3r_training.parallel import Parallel, backward
from gen3r_training.progress import TrainProgress, Work
from gen3r_training.report import Report
from gen3r_training.resume import (
    CHECKPOINTS,
    FINAL,
    FORMAT,
    Start,
    check_output,
    output_lock,
    plain_config,
    samples_per_step,
)
from gen3r_training.stages import Stage
from gen3r_training.stopping import Stopped, StopSignals, TrainingError, full_disk_told
from gen3r_training.train_state import TrainState

MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient, before the run ends


def train(stage: Stage, config: TrainConfig, parallel: Parallel) -> Path:
    """Train `stage.module` and write the finished pipeline. Collective.

    Returns
    -------
    OUTPUT/final_pipeline

    Raises
    ------
    ValueError : `check_output`; a checkpoint of another model or data.
    TrainingError : ten steps in a row were not finite, or the disk is full; one line.
    Stopped : SIGTERM or Ctrl-C came; the run was saved before.
    """
    start = check_output(config, parallel.data_ranks)
    output = config.output_dir
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals(told=parallel.is_main))
        lock_note = stack.enter_context(output_lock(output, parallel))
        stack.enter_context(full_disk_told(output, "the run's files"))
        on_main(parallel, f"{output} could not be prepared", lambda: _prepare(output))
        run = _Run(stage, config, parallel, start, signals)
        stack.enter_context(contextlib.closing(run.report))
        stack.enter_context(contextlib.closing(run.stream))
        stack.enter_context(run.progress)
        for line in filter(None, (lock_note, *start.notes)):
            run.progress.say(line)
        run.steps()
        return run.finish()


@dataclass(frozen=True)
class _Step:
    """What a step came to. norm: of the gradient before clipping; logs: means over all samples."""

    loss: float
    norm: float
    finite: bool
    logs: dict[str, float] = field(default_factory=dict)


class _Run:
    """One run: what `train` holds together."""

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        parallel: Parallel,
        start: Start,
        signals: StopSignals,
    ) -> None:
        self.stage, self.config, self.parallel, self.signals = stage, config, parallel, signals
        self.finished = start.step
        self.folder = config.output_dir / CHECKPOINTS
        counts = tuple(stage.dataset.counts)
        order = SampleOrder(counts, config.data_weights, config.seed)
        self.per_step = samples_per_step(config, parallel.data_ranks)
        self.steps_per_epoch = math.ceil(order.epoch_length / self.per_step)
        self.total = config.num_epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)
        self.state = TrainState(stage, config, parallel)
        self.saved = -1  # finished steps of the newest checkpoint that this run has
        self.progress = TrainProgress(self._work(), stage.device, shown=parallel.is_main)
        self._resume(start, counts)
        if self.finished < self.total:  # now rather than after the first thousand steps
            needed = checkpoints.stored_bytes(self.state.tensors())
            checkpoints.require_room(self.folder, needed, parallel)
        self.stream = SampleStream(
            stage.dataset,
            order,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            rank=parallel.data_rank,
            ranks=parallel.data_ranks,
            first_step=self.finished,
            num_workers=config.num_workers,
            pin_memory=stage.device.type == "cuda",
            report=self.progress.say,
        )
        self.report = Report(
            config.output_dir, config.report, self.finished, active=parallel.is_main
        )

    def _work(self) -> Work:
        peak = peak_flops(self.stage.device)
        return Work(
            first=self.finished,
            total=self.total,
            steps_per_epoch=self.steps_per_epoch,
            epochs=math.ceil(self.total / self.steps_per_epoch),
            flops=self.stage.flops * self.per_step,
            peak=None if peak is None else peak * self.parallel.world,
        )

    # ------------------------------------------------------------------------------------- stepping

    def steps(self) -> None:
        """All steps that are left, with what is due between them."""
        while self.finished < self.total:
            began = time.perf_counter()
            rate = schedule.learning_rate(self.config, self.finished, self.total)
            limit = schedule.clip_norm(self.config, self.finished, self.total)
            step = self._step(rate, limit)
            self.state.skipped.count(step.finite)
            if step.finite and self.state.ema is not None:
                self.state.ema.update(self.state.optimizer.masters(), self.finished)
            self.finished += 1
            self._tell(step, rate, time.perf_counter() - began)
            # Before a validation of minutes: whoever asked may not wait so long.
            self._stop_if_asked()
            if self._due(self.config.validate_every):
                self._validate()
            if self._due(self.config.save_every):
                self._save()

    def _step(self, rate: float, limit: float) -> _Step:
        """One optimizer step: `gradient_accumulation` micro steps and the update."""
        count = self.config.gradient_accumulation
        losses: list[Tensor] = []
        logs: list[Mapping[str, float | Tensor]] = []
        for samples in itertools.islice(self.stream, count):
            result = self.stage.step(samples)
            backward(self.state.optimizer, result.loss / count)
            losses.append(result.loss.detach())
            logs.append(result.logs)
        loss = math.fsum(_numbers(losses)) / count
        if self.parallel.agree(not math.isfinite(loss)):
            self.state.optimizer.discard()
            norm = math.nan
        else:
            norm = self.state.optimizer.step(rate, limit)
        means = self.parallel.mean({**_means(logs), "loss": loss})
        return _Step(means.pop("loss"), norm, math.isfinite(norm), means)

    def _tell(self, step: _Step, rate: float, seconds: float) -> None:
        values: dict[str, float | bool] = {"loss": step.loss, "lr": rate, "grad_norm": step.norm}
        values |= {"seconds": seconds, **step.logs}
        if not step.finite:
            values["skipped"] = True
        mfu = self.progress.mfu()
        if mfu is not None:
            values["mfu"] = mfu
        self.report.step(self.finished, values)
        self.progress.step(self.finished, step.loss if step.finite else None, seconds)
        if step.finite:
            return
        place = f"step {self.finished}: loss {step.loss:g}, gradient norm {step.norm:g}"
        self.progress.say(f"{place}: not finite, step skipped ({self.state.skipped.total} so far)")
        if self.state.skipped.in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"{MOST_SKIPPED} steps in a row were not finite (the last: {place}); lower "
                f"--learning_rate or --clip_norm, or look at the data; {self._kept()}"
            )

    # ---------------------------------------------------------------------- between and after steps

    def _due(self, every: int) -> bool:
        """Every so many steps and at the end; 0 is never."""
        return every > 0 and (self.finished % every == 0 or self.finished == self.total)

    def _validate(self) -> None:
        """Without a trace in the training: the averaged weights go again, random states return."""
        folder = self.report.validation_folder(self.finished)
        devices = [self.stage.device] if self.stage.device.type == "cuda" else []
        ema = self.state.ema
        averaged = contextlib.nullcontext() if ema is None else ema.applied(self.stage.module)
        with torch.random.fork_rng(devices), averaged, torch.no_grad():
            result = self.stage.validate(folder, self.finished)
        self.report.validation(self.finished, result)
        facts = "  ".join(f"{name} {value:.4g}" for name, value in result.scalars.items())
        self.progress.say(f"validation after step {self.finished}  {facts}".rstrip())

    def _stop_if_asked(self) -> None:
        if not self.parallel.agree(self.signals.number is not None):
            return
        interrupted = self.parallel.agree(self.signals.number == signal.SIGINT)
        self._save()
        raise Stopped(
            f"stopped after step {self.finished} of {self.total}; {self._kept()}; "
            "go on with --resume auto",
            signal.SIGINT if interrupted else signal.SIGTERM,
        )

    def finish(self) -> Path:
        """Save the last step and write the finished pipeline."""
        self._save()
        self._sum_up()
        target = self.config.output_dir / FINAL
        weights = self.parallel.full(self.state.weights())

        def write() -> None:
            hidden = target.with_name(f".{FINAL}.partial")
            shutil.rmtree(hidden, ignore_errors=True)
            self.stage.save_final(hidden, weights)
            _replace_folder(hidden, target)

        what = f"{target} was not written ({self._kept()}: go on with --resume auto)"
        on_main(self.parallel, what, write)
        self.progress.say(f"wrote {target}")
        return target

    def _sum_up(self) -> None:
        """What was left out in the whole of the run, as far as this process has run it."""
        skipped = self.state.skipped.total
        if skipped:
            self.progress.say(f"{skipped} steps were skipped: not finite")
        own = self.stream.skipped if self.parallel.context_rank == 0 else {}
        replaced: Counter[str] = Counter()
        for counts in from_all(own):
            replaced.update(counts)
        if replaced:
            scenes = ", ".join(f"{name} ({count})" for name, count in replaced.most_common())
            self.progress.say(f"{replaced.total()} samples were replaced, by scene: {scenes}")

    # ---------------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        """Write a checkpoint unless there is one of this step."""
        if self.saved == self.finished:
            return
        facts = {
            "format": FORMAT,
            "config": plain_config(self.config),
            "samples_per_step": self.per_step,
            "scenes": list(self.stage.dataset.counts),
            "ranks": self.parallel.world,
            "skipped": vars(self.state.skipped),
            "versions": _versions(),
        }
        tensors, began = self.state.tensors(), time.perf_counter()
        path = checkpoints.save(
            self.folder, self.finished, tensors, facts, self.parallel, self.config.keep
        )
        self.saved = self.finished
        size = checkpoints.stored_bytes(tensors) / 2**30
        seconds = time.perf_counter() - began
        self.progress.say(f"saved {path.name} ({size:.2f} GiB, {seconds:.1f} s)")

    def _resume(self, start: Start, counts: Sequence[int]) -> None:
        path = start.checkpoint
        if path is None:
            return
        scenes = start.state["scenes"]
        if list(counts) != scenes:
            raise ValueError(
                f"checkpoint {path} was trained on {scenes} scenes per data root, here are "
                f"{list(counts)}; give the same --data_root, or start anew with --init_from"
            )
        self.state.load(path, start.state["skipped"])
        if path.resolve().parent == self.folder.resolve():
            self.saved = self.finished

    def _kept(self) -> str:
        if self.saved < 0:
            return f"no checkpoint was saved in {self.folder}"
        return f"checkpoint {self.folder / checkpoints.folder_name(self.saved)}"


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """As floats, with one transfer for all tensors."""
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    fetched = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(fetched) if isinstance(value, Tensor) else float(value) for value in values]


def _means(logs: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float]:
    """Mean over the micro steps, by name."""
    names = list(dict.fromkeys(name for log in logs for name in log))
    means = {}
    for name in names:
        values = _numbers([log[name] for log in logs if name in log])
        means[name] = math.fsum(values) / len(values)
    return means


def _prepare(output: Path) -> None:
    """Make the folder, without what dead runs left half written; this run holds its lock."""
    (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(output / CHECKPOINTS)
    for pattern in (f".*{FINAL}.partial*", f".{FINAL}.old"):
        for path in output.glob(pattern):
            shutil.rmtree(path)


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an older folder there is renamed away first, then removed."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout
        versions["gen3r-engine"] = metadata.version("gen3r-engine")
    return {**versions, "platform": sys.platform}
