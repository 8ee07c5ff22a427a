"""The loop around an objective: optimiser, averaged weights, schedule, log, final folder."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gen3r.folders import check_writable, whole_folder
from gen3r.pipeline import Gen3RPipeline
from gen3r_kernels import Backends
from gen3r_training.ema import Ema
from gen3r_training.optimizer import Optimizer
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.objective import Objective
from gen3r_training.resident.steps import Stepper

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips

LOG = "resident.jsonl"
MOST_SKIPPED = 50
FRAME_STEP, SIZE_STEP = 4, 56  # as `gen3r.scene.SceneRequest` takes: 4k + 1 frames, pixels
STORED = torch.float16  # of the written folder: eleven bits where bfloat16 has eight
Say = Callable[[str], None]


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


def train_resident(config: ResidentConfig, say: Say = print) -> dict[str, Any]:
    """Train one stage and write the pipeline folder `config.output`; returns the report.

    The folder holds ``resident.jsonl`` too: a line for every `log_every` steps, evaluations, and
    the report last, after those of the stages before.

    Raises
    ------
    ValueError : the data or the model are not what the stage needs. FileExistsError : the output
    exists. Diverged : `MOST_SKIPPED` steps in a row were not finite.
    """
    if config.output.exists():
        raise FileExistsError(f"--output {config.output} exists; choose another or remove it")
    check_writable(config.output.absolute().parent)  # known before minutes are spent
    device = chosen_device(config)
    # A small float32 model in TF32: its products keep 11 bits, as float16 weights do.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    began = time.perf_counter()
    pipeline = load_model(config, device)
    objective = build_objective(pipeline, config, device)
    say(f"{config.stage}: ready after {time.perf_counter() - began:.1f} s on {device}")
    run = _Run(objective, pipeline, config, device, say)
    run.steps()
    report = run.finish()
    report["ready_seconds"] = round(run.began - began, 2)
    report["total_seconds"] = round(time.perf_counter() - began, 2)
    _write(objective.components, pipeline, config, [*run.lines, report])
    say(f"wrote {config.output}")
    return report


def chosen_device(config: ResidentConfig) -> torch.device:
    """ValueError where a GPU is asked for and there is none."""
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise ValueError("--device cuda: there is no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if found and config.device != "cpu" else "cpu")


def load_model(config: ResidentConfig, device: torch.device) -> Gen3RPipeline:
    """The pipeline to begin with, on the device, in the dtype of the run.

    On a CPU bfloat16 is slower and nothing else: there the run is in float32.
    """
    dtype = torch.float32
    if device.type == "cuda" and config.dtype == "bfloat16":
        dtype = torch.bfloat16
    return stored_model(config, torch.float32).to(device, dtype)


def stored_model(config: ResidentConfig, dtype: torch.dtype) -> Gen3RPipeline:
    """`config.model`, or a model with random weights, with the components of `config.take`."""
    backends = Backends(attention=config.attention, operators=config.operators)
    if config.model is not None:
        pipeline = Gen3RPipeline.from_pretrained(config.model, torch_dtype=dtype, backends=backends)
    else:
        from gen3r.nano import build_untrained

        pipeline = build_untrained(config.seed, backends)
        prepare_weights(pipeline, config.seed)
    for name, folder in config.take:
        other = Gen3RPipeline.from_pretrained(folder, torch_dtype=dtype, backends=backends)
        values = {name: getattr(other.config, name)}
        pipeline.config = replace(pipeline.config, **cast(Any, values))
        setattr(pipeline, name, getattr(other, name))
    return pipeline.to(torch.device("cpu"), dtype)


@torch.no_grad()
def prepare_weights(pipeline: Gen3RPipeline, seed: int) -> None:
    """Give untrained weights the scales that training from nothing needs.

    PyTorch's defaults are kept but in the transformer, whose modulation is as in Wan (normal /
    sqrt(dim)), whose last layer is 0 and whose other layers are Xavier's. VGGT's objective has
    starting values of its own.
    """
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.zeros_(transformer.head.head.weight)


def build_objective(
    pipeline: Gen3RPipeline, config: ResidentConfig, device: torch.device
) -> Objective:
    """The stage's objective with its clips on the device."""
    from gen3r_training.procedural import load_clips

    train = load_clips(config.data, "train", device, config.scenes)
    held_out = load_clips(config.data, "held_out", device, config.held_out)
    for split, clips in (("train", train), ("held_out", held_out)):
        check_clips(split, clips)
    made: Any
    if config.stage == "vae":
        from gen3r_training.resident.vae import VAEObjective as made
    elif config.stage == "vggt":
        from gen3r_training.resident.vggt import VGGTObjective as made
    elif config.stage == "text":
        from gen3r_training.resident.text import TextObjective as made
    elif config.stage == "adapter":
        from gen3r_training.resident.adapter import AdapterObjective as made
    else:
        from gen3r_training.resident.diffusion import DiffusionObjective as made
    return cast(Objective, made(pipeline, train, held_out, config))


def check_clips(split: str, clips: Clips) -> None:
    """ValueError for clips of a length or size that no model of this kind takes."""
    frames, height, width = clips.depth.shape[1:]
    if frames % FRAME_STEP != 1:
        raise ValueError(
            f"the {split} clips have {frames} frames; prepare some with 4k + 1 (--frames 17)"
        )
    if height != width or height % SIZE_STEP:
        raise ValueError(
            f"the {split} clips have {height} x {width} pixels; prepare squares of a multiple of "
            f"{SIZE_STEP} (--size 112)"
        )


class _Run:
    """One run: what `train_resident` holds together."""

    def __init__(
        self,
        objective: Objective,
        pipeline: Gen3RPipeline,
        config: ResidentConfig,
        device: torch.device,
        say: Say,
    ) -> None:
        self.objective, self.pipeline, self.config, self.say = objective, pipeline, config, say
        self.device = device
        module = objective.module
        half = next(module.parameters()).dtype == torch.bfloat16
        self.optimizer = Optimizer(
            module,
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            master="float32" if half else "none",
            seed=config.seed,
        )
        self.ema = Ema(self.optimizer.masters(), config.ema) if config.ema else None
        self.generator = torch.Generator(device).manual_seed(config.seed)
        captured = config.captured and device.type == "cuda"
        self.stepper = Stepper(objective, captured=captured)
        self.lines: list[dict[str, Any]] = []
        self.finished, self.skipped, self.began = 0, 0, time.perf_counter()
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})  # the last one's step and figures

    def steps(self) -> None:
        """All steps, or as many as the minutes allow."""
        config, in_a_row = self.config, 0
        while (progress := self._progress()) < 1:
            rate = config.rate(self.finished, progress)
            batch = self.objective.draw(self.generator, config.batch)
            loss, logs = self.stepper.run(batch)
            norm = self.optimizer.step(rate, config.clip_norm)
            if math.isfinite(norm):
                in_a_row = 0
                if self.ema is not None:
                    self.ema.update(self.optimizer.masters(), self.finished)
            else:
                self.skipped, in_a_row = self.skipped + 1, in_a_row + 1
                if in_a_row >= MOST_SKIPPED:
                    raise Diverged(
                        f"{MOST_SKIPPED} steps in a row were not finite (the last: step "
                        f"{self.finished}); lower --learning_rate or use --dtype float32"
                    )
            self.finished += 1
            if self._due(config.log_every):
                self._log(loss, logs, norm, rate)
            if self._due(config.evaluate_every):
                self._evaluate()

    def _progress(self) -> float:
        """How much of the run is over, 0..1."""
        share = self.finished / self.config.steps
        if self.config.minutes is None:
            return share
        return max(share, (time.perf_counter() - self.began) / 60 / self.config.minutes)

    def _due(self, every: int) -> bool:
        return every > 0 and self.finished % every == 0

    def _log(self, loss: Tensor, logs: dict[str, Tensor], norm: float, rate: float) -> None:
        values = {"loss": float(loss), **{name: float(value) for name, value in logs.items()}}
        seconds = time.perf_counter() - self.began
        self._keep("step", {**values, "grad_norm": norm, "lr": rate, "seconds": round(seconds, 2)})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        each = 1e3 * seconds / self.finished
        self.say(f"{self.finished:>6}  {seconds:6.1f} s  {each:6.1f} ms  lr {rate:.2e}  {shown}")

    def _keep(self, kind: str, values: dict[str, Any]) -> None:
        self.lines.append(
            {"stage": self.config.stage, "kind": kind, "step": self.finished, **values}
        )

    def _evaluate(self) -> dict[str, float]:
        if self.evaluated[0] == self.finished:
            return self.evaluated[1]
        with self._averaged(), torch.no_grad():
            found = self.objective.evaluate()
        self._keep("evaluation", dict(found))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.say(f"{self.finished:>6}  evaluation  {shown}")
        self.evaluated = self.finished, found
        return found

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        if self.ema is None:
            return contextlib.nullcontext()
        return self.ema.applied(self.objective.module)

    def finish(self) -> dict[str, Any]:
        """The averaged weights go into the module, in float32; returns the report."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        found = self._evaluate()
        weights = self.optimizer.masters() if self.ema is None else self.ema.average
        weights = {name: value.detach().clone() for name, value in weights.items()}
        self._restore(weights)
        self.objective.finish()
        config = self.config
        return {
            **{"stage": config.stage, "kind": "report", "steps": self.finished},
            "samples": self.finished * config.batch,
            "seconds": round(seconds, 2),
            "skipped": self.skipped,
            "parameters": sum(value.numel() for value in weights.values()),
            "held_out": found,
            "config": asdict(config),
            "device": _device_name(self.device),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        """Trained components in float32, so that nothing is rounded to bf16 on the way to disk."""
        self.objective.module.requires_grad_(False).float()
        for name, parameter in self.objective.module.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _write(
    trained: dict[str, nn.Module],
    pipeline: Gen3RPipeline,
    config: ResidentConfig,
    lines: list[dict[str, Any]],
) -> None:
    """The pipeline folder in float16, with the log of all stages.

    The other components are read again: this run held them in its own dtype. The mark `untrained`
    goes with the last stage, if there were others before it.
    """
    source = stored_model(config, STORED)
    configs = {name: getattr(pipeline.config, name) for name in trained}
    begun = config.model is not None
    whole = replace(
        source,
        config=replace(source.config, **cast(Any, configs)),
        **cast(Any, {name: module.to("cpu", STORED) for name, module in trained.items()}),
        untrained=source.untrained and not (begun and config.stage == "diffusion"),
    )
    folders = [config.model, *(folder for _, folder in config.take)]
    logs = [folder / LOG for folder in dict.fromkeys(folders) if folder is not None]
    before = dict.fromkeys(
        line for log in logs if log.is_file() for line in log.read_text().splitlines(True)
    )
    text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    output = config.output.absolute()
    with whole_folder(output.parent, output.name) as pending:
        whole.save_pretrained(pending.path)
        (pending.path / LOG).write_text("".join(before) + text)
