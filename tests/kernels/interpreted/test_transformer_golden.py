"""The diffusion transformer with every operator in Triton: its stored output, its gradients."""

from __future__ import annotations

import pytest
import torch

from gen3r_kernels import Backends
from tests.conftest import golden_folders
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error
from tests.golden_fixtures.test_transformer import build, inputs, run

TRITON = Backends(attention="triton", operators="triton")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The first folder that holds the transformer's fixture."""
    folders = golden_folders(request.config)
    found = [g for f in folders if (g := Golden(f, "transformer")).path.is_file()]
    if not found:
        pytest.skip(f"no transformer.safetensors in {', '.join(map(str, folders))}")
    return found[0]


def smallest(golden: Golden) -> str:
    """The case with the fewest tokens."""
    cases = golden.meta["cases"]
    return min(cases, key=lambda name: cases[name]["B"] * cases[name]["seq_len"])


def test_output(golden: Golden) -> None:
    case = smallest(golden)
    out = run(build(golden, TRITON), inputs(golden, case))
    assert relative_error(out, golden[f"{case}/out"]) <= COMPONENT_TOLERANCE


def test_gradients(golden: Golden) -> None:
    """Of every parameter, against plain PyTorch; one block, for the interpreter's sake."""
    given = inputs(golden, smallest(golden))
    seed = torch.randn_like(given["latents"])
    gradients = []
    for backends in (TRITON, Backends(operators="reference")):
        model = build(golden, backends)
        model.blocks = model.blocks[:1]
        conditions = model.condition(
            given["text"], given["image"], given["control"], given["cameras"]
        )
        out = model(given["latents"], given["timesteps"], conditions)
        (out * seed).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    ours, plain = gradients
    for name, expected in plain.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            # A key's bias shifts all scores alike: its gradient is rounding of an exact 0.
            largest = expected.abs().max()
            error = (ours[name] - expected).abs().max()
            assert error <= 5 * COMPONENT_TOLERANCE * largest + 1e-5, name
