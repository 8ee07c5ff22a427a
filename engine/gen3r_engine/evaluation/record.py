"""Where, when and of what a measurement was made."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gen3r.run import device_name
from gen3r_engine.versions import versions

if TYPE_CHECKING:
    from gen3r.pipeline import Gen3RPipeline
    from gen3r_engine.engine import Engine

CHECKOUT = Path(__file__).resolve().parents[3]
SAMPLED = 64  # values of every tensor that a digest of the weights looks at


def checkout_commit() -> str:
    """The checkout's commit, with a plus when tracked files differ; "unknown" outside git."""
    if not (CHECKOUT / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(CHECKOUT)]
    head = _run([*git, "rev-parse", "--short=12", "HEAD"])
    if head is None or head.returncode != 0:
        return "unknown"
    changed = _run([*git, "diff", "--quiet", "HEAD"])
    return head.stdout.strip() + ("+" if changed is None or changed.returncode else "")


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """What the command came to; None where it cannot be started (it is not installed)."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and the thread count."""
    if device.type == "cuda":
        return device_name(device)
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """GPU (or processor), capability, driver, versions, commit and time, as plain JSON values.

    What no program here tells is None. commit : in place of what git says, where the tree is not a
    checkout.
    """
    capability, driver = torch.backends.cpu.get_cpu_capability(), None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        asked = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        driver = None if asked is None else asked.stdout.split("\n")[0] or None
    return {
        "gpu": machine_name(device),
        "capability": capability,
        "driver": driver,
        "versions": versions(),
        "commit": commit or checkout_commit(),
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def model_facts(engine: Engine, checkpoint: str | None) -> dict[str, Any]:
    """Which model ran, and what the config came to. checkpoint : None for the embedded model."""
    own = engine.pipeline.config
    return {
        "checkpoint": checkpoint or "embedded",
        "weights": weights_digest(engine.pipeline),
        "untrained": engine.pipeline.untrained,
        "frames": own.num_frames,
        "size": own.size,
        "guidance_scale": own.guidance_scale,
        "residency": engine.choice.residency,
        "dtype": engine.choice.dtype,
        **numerics(engine),
    }


def numerics(engine: Engine) -> dict[str, Any]:
    """What an engine's values depend on, beside the weights and their dtype."""
    return {
        "preset": engine.choice.preset,
        "attention": engine.choice.attention,
        "encoder_precision": engine.config.encoder_precision,
    }


def weights_digest(pipeline: Gen3RPipeline) -> str:
    """Tells two sets of weights apart: some values of every tensor but the text encoder's."""
    digest = hashlib.sha256()
    for component in ("transformer", "wan_vae", "geo_adapter", "vggt", "clip_image_encoder"):
        for name, value in getattr(pipeline, component).state_dict().items():
            flat = value.detach().reshape(-1)
            step = max(1, len(flat) // SAMPLED)
            some = flat[::step][:SAMPLED].float().cpu().contiguous()
            digest.update(f"{component} {name} {list(value.shape)}".encode())
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
