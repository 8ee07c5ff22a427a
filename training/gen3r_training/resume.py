"""Where a run begins: its output folder is free or its own, and its checkpoint fits."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r.folders import check_writable
from gen3r_training.checkpoints import found, read_state
from gen3r_training.config import TrainConfig
from gen3r_training.report import require_report

if TYPE_CHECKING:
    from gen3r_training.parallel import Parallel

FINAL = "final_pipeline"
CHECKPOINTS = "checkpoints"
FORMAT = 1  # of state.json
# What a resumed run may change: its length, what it writes, how it computes, where files lie.
FREE_FIELDS = {
    *("num_epochs", "max_steps", "save_every", "keep", "validate_every", "report", "num_workers"),
    *("strategy", "context_parallel", "gradient_checkpointing", "compile", "device"),
    *("kept_blocks", "deterministic"),
    *("attention", "operators", "resume", "init_from", "output_dir", "latent_cache"),
    *("data_root", "pretrained_path", "geo_adapter", "vggt_path", "wan_vae_path"),
    # Their product with the number of data ranks must stay: `_check_samples`.
    *("batch_size", "gradient_accumulation"),
}


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    checkpoint : None for a fresh start; state : its state.json, empty for a fresh start
    step : finished steps; notes : lines for the person
    """

    checkpoint: Path | None
    step: int
    state: Mapping[str, Any]
    notes: tuple[str, ...]


def check_output(config: TrainConfig, data_ranks: int) -> Start:
    """Decide where the run begins, reading JSON only: no tensor, no device.

    Raises
    ------
    ValueError : the output folder holds another run, or the checkpoint does not fit; one line.
    OSError : the output folder cannot be written.
    """
    check_writable(config.output_dir)
    require_report(config.report)
    present = found(config.output_dir / CHECKPOINTS)
    path = _chosen(config, present)
    if path is None:
        return _fresh(config, present)
    state = read_state(path)
    _check_config(path, state, config)
    _check_samples(path, state, config, data_ranks)
    step = int(state["step"])
    _check_newest(config, path, step, present)
    return Start(path, step, state, _notes(path, state, config))


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    fields = {"stage": config.stage, **dataclasses.asdict(config)}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return plain


def samples_per_step(config: TrainConfig, data_ranks: int) -> int:
    """Samples that one optimizer step takes over all ranks."""
    return config.batch_size * config.gradient_accumulation * data_ranks


def _chosen(config: TrainConfig, present: Mapping[int, Path]) -> Path | None:
    if config.resume is None:
        return None
    if config.resume == "auto":
        return present[max(present)] if present else None
    path = Path(config.resume)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    inside = found(path)
    if inside:
        raise ValueError(
            f"--resume {config.resume} holds checkpoints and is none; use {inside[max(inside)]}"
        )
    if not path.is_dir():
        known = ", ".join(p.name for p in present.values()) or "none"
        raise ValueError(
            f"--resume {path} does not exist; checkpoints of --output_dir: {known} (or use 'auto')"
        )
    return path


def _fresh(config: TrainConfig, present: Mapping[int, Path]) -> Start:
    output = config.output_dir
    if present:
        raise ValueError(
            f"--output_dir {output} holds a run of {max(present)} steps; add --resume auto to go "
            "on with it, or choose another folder"
        )
    if (output / FINAL).exists():
        raise ValueError(f"{output / FINAL} exists; choose another --output_dir or remove it")
    told = (f"no checkpoint in {output}: starting anew",) if config.resume else ()
    return Start(None, 0, {}, told)


def _check_config(path: Path, state: Mapping[str, Any], config: TrainConfig) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state.get('format')}, this version reads {FORMAT}; "
            "resume it with the version that wrote it"
        )
    then, now = state["config"], plain_config(config)
    for name, value in now.items():  # the stage comes first
        if name in FREE_FIELDS or then.get(name) == value:
            continue
        raise ValueError(
            f"checkpoint {path} was made with --{name} {_word(then.get(name))}, not "
            f"{_word(value)}; use the same, or start anew from its weights with --init_from"
            if name != "stage"
            else f"checkpoint {path} is of stage '{then.get(name)}', not of '{value}'"
        )


def _check_samples(
    path: Path, state: Mapping[str, Any], config: TrainConfig, data_ranks: int
) -> None:
    then, now = int(state["samples_per_step"]), samples_per_step(config, data_ranks)
    if then != now:
        raise ValueError(
            f"checkpoint {path} took {then} samples per step; --batch_size {config.batch_size} x "
            f"--gradient_accumulation {config.gradient_accumulation} x {data_ranks} data ranks is "
            f"{now}; make the product {then}"
        )


def _check_newest(config: TrainConfig, path: Path, step: int, present: Mapping[int, Path]) -> None:
    """Going on from an older checkpoint would mix two runs in one folder."""
    own = path.resolve().parent == (config.output_dir / CHECKPOINTS).resolve()
    other = [p for s, p in present.items() if not own or s > step]
    if other:
        raise ValueError(
            f"--output_dir {config.output_dir} holds {other[-1].name}, which the run from "
            f"{path} would meet; choose another --output_dir or remove it"
        )


def _notes(path: Path, state: Mapping[str, Any], config: TrainConfig) -> tuple[str, ...]:
    then, now = state["config"], plain_config(config)
    changed = [
        f"{name} {_word(then.get(name))} -> {_word(value)}"
        for name, value in now.items()
        if then.get(name) != value and name != "resume"
    ]
    notes = [f"resuming {path} after {state['step']} steps"]
    if changed:
        notes.append(f"changed since: {', '.join(changed)}")
    return tuple(notes)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(empty)"
    return str(value)


@contextlib.contextmanager
def output_lock(output: Path, parallel: Parallel) -> Iterator[str | None]:
    """Hold OUTPUT/.lock on the main rank, so that two runs do not write into one folder.

    The system lets go of it when the process ends, however it ends. Yields a line for the person
    where the file system has no locks.

    Raises
    ------
    ValueError : another run holds it; on every rank.
    """
    held, note = None, None
    busy = False
    if parallel.is_main:
        output.mkdir(parents=True, exist_ok=True)
        held = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            note = f"{output} is on a file system without locks; let no other run write there"
    try:
        if parallel.agree(busy):
            raise ValueError(f"another run is writing into --output_dir {output}; use another one")
        yield note
    finally:
        if held is not None:
            os.close(held)
