"""The tiny complete pipeline of the end-to-end fixtures, from its stored configs and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from gen3r.components import COMPONENTS
from gen3r.config import Gen3RConfig
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import Golden


def build_component(weights: Golden, name: str, **overrides: Any) -> nn.Module:
    """One component of e2e_weights in float32, strictly loaded under upstream's names."""
    component = COMPONENTS[name]
    config = component.config.from_dict(weights.meta["configs"][name] | overrides)
    module = component.build(config, Backends())
    state = weights.weights(f"{name}/")
    if component.keys is not None:
        state = component.keys.state_from_upstream(state)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def build_pipeline(weights: Golden) -> Gen3RPipeline:
    """All components.

    Upstream's adapter always decodes to the token grid of 560 px; here that follows from the latent
    size.
    """
    configs = {
        name: component.config.from_dict(weights.meta["configs"][name])
        for name, component in COMPONENTS.items()
    }
    scheduler = {k: v for k, v in weights.meta["configs"]["scheduler"].items() if k[0] != "_"}
    return Gen3RPipeline(
        config=Gen3RConfig(**configs),
        **{name: build_component(weights, name) for name in COMPONENTS},
        tokenizer=AutoTokenizer.from_pretrained(weights.folder / "e2e_tokenizer"),
        scheduler=make_euler_scheduler(**scheduler),
    )


def enlarge(control: torch.Tensor, height: int) -> torch.Tensor:
    """Small control images [N, 3, h, w] uint8, repeated to `height` rows; float in [0, 1]."""
    factor = height // control.shape[-2]
    return control.repeat_interleave(factor, -1).repeat_interleave(factor, -2).float() / 255
