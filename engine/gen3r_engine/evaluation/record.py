"""Where, when and of what a measurement was made."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gen3r.run import device_name
from gen3r_engine.engine import Engine
from gen3r_engine.versions import versions

CHECKOUT = Path(__file__).resolve().parents[3]


def checkout_commit() -> str:
    """The checkout's commit, with a plus when tracked files differ; "unknown" outside git."""
    if not (CHECKOUT / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(CHECKOUT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """GPU (or processor), capability, driver, versions, commit and time, as plain JSON values.

    commit : in place of what git says, where the tree is not a checkout.
    """
    gpu = f"cpu {platform.machine()} {torch.get_num_threads()} threads"
    capability, driver = torch.backends.cpu.get_cpu_capability(), None
    if device.type == "cuda":
        gpu = device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "gpu": gpu,
        "capability": capability,
        "driver": driver,
        "versions": versions(),
        "commit": commit or checkout_commit(),
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def model_facts(engine: Engine) -> dict[str, Any]:
    """Which model ran, and what the config came to."""
    own = engine.pipeline.config
    return {
        "untrained": engine.pipeline.untrained,
        "frames": own.num_frames,
        "size": own.size,
        "guidance_scale": own.guidance_scale,
        "preset": engine.choice.preset,
        "dtype": engine.choice.dtype,
        "attention": engine.choice.attention,
        "residency": engine.choice.residency,
        "encoder_precision": engine.config.encoder_precision,
    }
