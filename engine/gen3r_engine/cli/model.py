"""Flags that choose a model and how it runs, the engine made from them, and its record."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.progress import StageProgress, note
from gen3r_engine.config import ENCODER_PRECISIONS, PRESETS, PROMPT_CACHES, TIERS

if TYPE_CHECKING:
    from gen3r_engine.config import EngineConfig
    from gen3r_engine.engine import Engine


def add_model_arguments(parser: argparse.ArgumentParser, batch: str = "1") -> None:
    """The flags of every command that runs a model. batch : its default, for the help."""
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        "--pretrained",
        metavar="PATH_OR_ID",
        help="folder or hub id of a checkpoint; default: the small embedded model",
    )
    add(
        "--batch", type=int, default=1, help=f"most scenes per pass of the model (default: {batch})"
    )
    add("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    add(
        "--encoder-precision",
        choices=ENCODER_PRECISIONS,
        default="model",
        help="of the encoder of the views; model: as --dtype (default)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1; default: cuda where there is one")
    add("--attention", default="auto", help="attention backend (see gen3r-engine doctor)")
    add("--allow_pickle", action="store_true", help="load .pth files too (weights only)")
    engine = parser.add_argument_group("engine")
    add = engine.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="exact",
        help="exact: upstream's mathematics; fp8: products of the transformer in 8 bits",
    )
    add(
        "--residency",
        choices=("auto", *TIERS),
        default="auto",
        help="which weights stay on the GPU; auto: the first of them that fits",
    )
    add("--max-memory", type=float, metavar="GIB", help="GPU memory that may be used")
    add("--no-compile", action="store_true", help="do not use torch.compile")
    add("--no-overlap", action="store_true", help="one stage after the other, in less memory")
    add("--retry-on-oom", action="store_true", help="out of memory: again with half the batch")
    add(
        "--cache-dir", metavar="DIR", help="compiled code and text features (~/.cache/gen3r-engine)"
    )
    add(
        "--prompt-cache",
        choices=PROMPT_CACHES,
        default="memory",
        help="where text features are kept (default: memory)",
    )
    add(
        "--plans",
        type=Path,
        metavar="DIR",
        help="exported files to run in the place of modules (see gen3r-engine export)",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The config that the flags ask for. UsageError for whatever cannot be had here."""
    from gen3r_engine.config import EngineConfig

    if args.batch < 1:
        raise UsageError(f"--batch {args.batch} is below 1; use 1 or more")
    limit = args.max_memory
    if limit is not None and not 0 < limit < float("inf"):
        raise UsageError(f"--max-memory {limit} is out of range; use GiB above 0")
    _check_device(args.device, args.attention)
    with user_input():
        return EngineConfig(
            preset=args.preset,
            residency=args.residency,
            max_memory_gib=limit,
            attention=args.attention,
            max_batch=args.batch,
            compiled=not args.no_compile,
            cache_dir=None if args.cache_dir is None else Path(args.cache_dir),
            prompt_cache=args.prompt_cache,
            retry_on_oom=args.retry_on_oom,
            overlap=not args.no_overlap,
            device=args.device,
            dtype=args.dtype,
            encoder_precision=args.encoder_precision,
            allow_pickle=args.allow_pickle,
            plans=args.plans,
        )


def _check_device(name: str, attention: str) -> None:
    import torch

    from gen3r_kernels import Backends

    device = name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_input(f"--device {device}", (RuntimeError,)):
        kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is not supported; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device} was asked, but this torch ({torch.__version__}) finds no CUDA GPU; "
            "use --device cpu, or install a CUDA build of torch and the driver"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
    with user_input("--attention"):
        backend = Backends(attention=attention).attention_backend
    reason = backend.why_not()
    if reason is None and backend.cuda_only and kind != "cuda":
        reason = "needs a CUDA GPU"
    if reason is not None:
        raise UsageError(f"--attention {attention}: {reason}; use --attention sdpa")


def model_defaults(name: str | None) -> tuple[int, int]:
    """Frames and size that the model makes by default, without loading it."""
    from gen3r.config import GEN3R

    if name is None:
        from gen3r.nano import NANO

        return NANO.num_frames, NANO.size
    own: dict[str, Any] = {}
    if _is_local(name):
        from gen3r.checkpoint import CheckpointError, read_own_values

        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{name} is not a folder; give a checkpoint folder or a hub id")
        own = read_own_values(folder)
    return own.get("num_frames", GEN3R.num_frames), own.get("size", GEN3R.size)


def _is_local(name: str) -> bool:
    """Whether a model name is a path. A hub id is `owner/name`, with nothing of that name here."""
    path = Path(name).expanduser()
    return path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def load_engine(name: str | None, config: EngineConfig) -> Engine:
    """The engine of a checkpoint, or of the embedded model; tells what a person should know."""
    from safetensors import SafetensorError

    from gen3r_engine.engine import Engine

    path = str(Path(name).expanduser()) if name is not None and _is_local(name) else name
    with user_input(kinds=(ValueError, OSError, SafetensorError)), StageProgress() as progress:
        if path is not None:
            progress("load checkpoint", 0, 1)
        engine = Engine.load(path, config)
        if path is not None:
            progress("load checkpoint", 1, 1)
    if engine.pipeline.untrained:
        note("the model's weights are untrained: the scene will be noise, not a place")
    for text in engine.notes:
        note(text)
    if engine.plans is not None:
        engine.plans.tell = note  # of requests that no plan fits
    return engine


def engine_record(engine: Engine) -> dict[str, Any]:
    """What run.json keeps of the engine: the config as given and what it came to."""
    choice = dataclasses.asdict(engine.choice)
    record: dict[str, Any] = {"config": dataclasses.asdict(engine.config), "resolved": choice}
    if engine.plans is not None:
        record["plans"] = {"report": list(engine.plans.report)}
    return record
