"""A pipeline of the published sizes with seeded random weights, holding only what is exported."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from gen3r.components import COMPONENTS
from gen3r.config import GEN3R
from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r_export.export import NEEDS_ADAPTER
from gen3r_export.parts import COMPONENT
from gen3r_kernels import Backends

SEED = 2601


def real_pipeline(parts: Collection[str], dtype: torch.dtype) -> Gen3RPipeline:
    """GEN3R's components for these parts on the CPU; NANO's in the place of the others."""
    wanted = {COMPONENT[part] for part in parts}
    if not wanted.isdisjoint(COMPONENT[part] for part in NEEDS_ADAPTER):
        wanted.add("geo_adapter")
    small = build_nano(dtype, backends=Backends(operators="reference"))
    modules: dict[str, Any] = {name: getattr(small, name) for name in COMPONENTS}
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        for name in sorted(wanted):
            module = COMPONENTS[name].build(getattr(GEN3R, name), Backends(operators="reference"))
            modules[name] = module.to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if "transformer" in wanted:
        _keep_small(modules["transformer"])
    return Gen3RPipeline(
        config=GEN3R,
        **modules,
        tokenizer=small.tokenizer,
        scheduler=small.scheduler,
        untrained=True,
    )


@torch.no_grad()
def _keep_small(transformer: torch.nn.Module) -> None:
    """Modulation like a trained model's: parameters that begin at zero would leave blocks out."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(0.0, 0.2)
