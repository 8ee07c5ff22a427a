"""The checkpoint manifest: names, shapes and latent constants of the six real components."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

from tests.conftest import SLIM_GOLDEN


@cache
def manifest_component(name: str) -> dict[str, Any]:
    """`tensors` (upstream name -> [shape, dtype]) and, for the autoencoders, `constants`."""
    text = gzip.decompress((SLIM_GOLDEN / "checkpoint_manifest.json.gz").read_bytes())
    component: dict[str, Any] = json.loads(text)["components"][name]
    return component


def manifest_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Upstream name -> shape."""
    return {n: tuple(shape) for n, (shape, _) in manifest_component(name)["tensors"].items()}
