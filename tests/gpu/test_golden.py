"""The transformer's stored outputs in bf16 on the GPU, with every backend and the fused operators.

A bf16 model is as good as bf16: its error against the stored float32 output may be twice that of
the same model on plain PyTorch operators, and it points the same way (cosine > 0.999).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r_kernels import ATTENTION_BACKENDS, Backends
from tests.golden_fixtures.golden import Golden, relative_error
from tests.golden_fixtures.test_transformer import build, inputs, run
from tests.kernels.interpreted.test_transformer_golden import golden

__all__ = ["golden"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"
HEAD_DIM = 40  # of the fixture


def moved(given: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return [x.to(DEVICE) for x in value] if isinstance(value, list) else value.to(DEVICE)

    return {name: move(value) for name, value in given.items()}


def output(golden: Golden, case: str, backends: Backends) -> Tensor:
    model = build(golden, backends).to(DEVICE, torch.bfloat16)
    return run(model, moved(inputs(golden, case))).float().cpu()


@pytest.mark.parametrize("name", [n for n, b in ATTENTION_BACKENDS.items() if b.exact])
def test_backend(golden: Golden, name: str) -> None:
    backend = ATTENTION_BACKENDS[name]
    probe = torch.empty(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    if (reason := backend.refusal(probe)) is not None:
        pytest.skip(f"{name}: {reason}")
    for case in golden.meta["cases"]:
        exact = golden[f"{case}/out"]
        ours = output(golden, case, Backends(attention=name))
        theirs = output(golden, case, Backends(attention="sdpa", operators="reference"))
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.999, case
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact), case
