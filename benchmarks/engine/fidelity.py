"""How far each provider's latents are from the plain pipeline in float32, step by step.

gen3r-engine bench --suite fidelity -- --part real --reference outputs/fidelity
gen3r-engine bench --suite fidelity --preset eager exact fp8 -- --part quarter
gen3r-engine bench --suite fidelity -- --steps 3 --frames 5 --size 112     # a quick look

real: the first 4 steps of the 50-step schedule at the asked size. quarter: all steps at half the
width and height. Weights, conditions and noise are the same for all, rounded to bfloat16 once.
--reference FOLDER keeps the float32 latents, a file a step, and goes on from what is there: a
second command, or one that was cut off, does not compute them again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.engine.common import (
    GUIDANCE,
    Options,
    Provider,
    Rows,
    parser,
    release,
    resolve_options,
)
from benchmarks.engine.inputs import StepInputs, make_inputs
from benchmarks.engine.step import backends_of, make_denoiser
from benchmarks.harness import BadInput
from benchmarks.timing import shape_name
from benchmarks.weights import build_transformer, fingerprint
from gen3r.schedulers import Schedule, make_schedule
from gen3r.transformer import WanTransformer
from gen3r_engine.fidelity import curve, engine_latents, part_of, plain_latents
from gen3r_kernels import Backends

PARTS = ("real", "quarter")
# Float32 attention written out in matrix products: without TF32 the library's fused form reaches a
# fraction of their rate.
PLAIN = Backends(operators="reference", attention="reference")
REAL_STEPS = 4


@dataclass(frozen=True)
class Part:
    """One comparison: its case, its size in pixels, and how many steps of the schedule."""

    case: str
    size: int
    steps: int


def parts_of(options: Options) -> list[Part]:
    """The parts that were asked for."""
    half = max(56, options.size // 112 * 56)
    known = {
        "real": Part("fidelity_real", options.size, min(REAL_STEPS, options.steps)),
        "quarter": Part("fidelity_quarter", half, options.steps),
    }
    return [known[name] for name in options.arguments.part]


class Reference:
    """The float32 latents of one part: in memory, and in a folder where one is given."""

    def __init__(self, folder: Path | None, identity: dict[str, object]) -> None:
        self.folder, self.latents = folder, list[Tensor]()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "reference.json"
        if note.exists() and json.loads(note.read_text()) != identity:
            raise BadInput(
                f"{folder} holds the latents of other weights, inputs or versions; give another "
                "folder or remove it"
            )
        note.write_text(json.dumps(identity))
        while (file := self._file(len(self.latents))).exists():
            self.latents.append(load_file(file)["latents"])

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{index + 1:03d}.safetensors"

    def keep(self, latents: Tensor) -> None:
        """One more step; its file appears whole."""
        if self.folder is not None:
            file = self._file(len(self.latents))
            scratch = file.with_suffix(".part")
            save_file({"latents": latents.contiguous()}, scratch)
            scratch.replace(file)
        self.latents.append(latents)

    def complete(self, inputs: StepInputs, schedule: Schedule, transformer: WanTransformer) -> None:
        """Compute the steps that are missing."""
        done = len(self.latents)
        if done >= len(schedule):
            return
        noise = self.latents[-1].to(inputs.noise) if done else inputs.noise
        print(f"float32 reference: steps {done + 1} to {len(schedule)}", flush=True)
        plain_latents(
            transformer,
            inputs.conditions,
            noise,
            part_of(schedule, done, len(schedule)),
            GUIDANCE,
            lambda _, latents: self.keep(latents),
        )


def reference_of(part: Part, options: Options, schedule: Schedule) -> Reference:
    """The plain pipeline in float32 over the part's steps."""
    config = options.model.transformer
    transformer = build_transformer(config, torch.float32, options.device, PLAIN)
    inputs = make_inputs(transformer, options.frames, part.size, options.batch)
    identity: dict[str, object] = {
        "weights": fingerprint(transformer),
        "noise": hashlib.sha256(inputs.noise.cpu().numpy().tobytes()).hexdigest()[:16],
        "shape": list(inputs.noise.shape),
        "steps": options.steps,
        "device": options.device.type,
    }
    folder = options.arguments.reference
    found = Reference(None if folder is None else folder / part.case, identity)
    found.complete(inputs, schedule, transformer)
    return found


def latents_of(
    provider: Provider, part: Part, options: Options, schedule: Schedule
) -> list[Tensor]:
    """The provider's latents over the part's steps.

    Raises
    ------
    Unavailable : its preset does not run here.
    """
    transformer = build_transformer(
        options.model.transformer, options.dtype, options.device, backends_of(provider, options)
    )
    inputs = make_inputs(transformer, options.frames, part.size, options.batch)
    if provider.preset is None:
        return plain_latents(transformer, inputs.conditions, inputs.noise, schedule, GUIDANCE)
    denoiser = make_denoiser(transformer, provider, options)
    found = engine_latents(denoiser, inputs.conditions, inputs.noise, schedule, GUIDANCE)
    denoiser.release()
    return found


def rounded(values: Sequence[float]) -> list[float]:
    """To seven digits."""
    return [float(f"{value:.7g}") for value in values]


def measure_part(part: Part, options: Options, rows: Rows) -> None:
    """The rows of all providers for one part."""
    schedule = part_of(make_schedule("euler", options.steps), 0, part.steps)
    shape = shape_name(options.frames, part.size, part.size)
    reference = reference_of(part, options, schedule)
    release(options.device)
    errors: dict[str, float] = {}

    def measure(provider: Provider) -> None:
        found = curve(latents_of(provider, part, options, schedule), reference.latents)
        errors[provider.name] = found.last
        rows.add(
            part.case,
            provider.name,
            "latent_error",
            "1",
            [found.last],
            error=found.last,
            shape=shape,
            schedule=options.steps,
            curve={"rel_error": rounded(found.rel_error), "cosine": rounded(found.cosine)},
        )
        release(options.device)

    rows.each(measure)
    if {"eager", "exact"} <= errors.keys() and errors["eager"] > 0:
        ratio = errors["exact"] / errors["eager"]
        print(f"{part.case}: exact has {ratio:.3g} times the error of eager", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/fidelity.jsonl; 1 if a provider failed."""
    made = parser("fidelity", __doc__, ("eager", "exact", "fp8"))
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument(
        "--reference", type=Path, help="folder of the float32 latents (default: none)"
    )
    arguments = made.parse_args(argv)
    options = resolve_options(arguments)
    if arguments.dtype is None:  # the curve of float32 against float32 says nothing
        options = replace(options, dtype_name="bfloat16")
    rows = Rows("fidelity", options)
    for part in parts_of(options):
        measure_part(part, options, rows)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
