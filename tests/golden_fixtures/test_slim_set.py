"""The committed slim set says the same as the full reference set it was cut from."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FULL_GOLDEN, SLIM_GOLDEN
from tests.golden_fixtures.make_slim import BUDGET, KEPT, STRIDED


def test_slim_set_is_a_cut_of_the_full_set() -> None:
    if not FULL_GOLDEN.is_dir():
        pytest.skip("the full reference set is not beside this checkout")
    for kind in KEPT:
        full = load_file(FULL_GOLDEN / f"{kind}.safetensors")
        for name, tensor in load_file(SLIM_GOLDEN / f"{kind}.safetensors").items():
            stem = next((s for s in STRIDED if name == f"{s}_s{STRIDED[s]}"), None)
            original = (
                full[name] if stem is None else full[stem][..., :: STRIDED[stem], :: STRIDED[stem]]
            )
            assert torch.equal(tensor, original), f"{kind}/{name}"


def test_slim_manifest_is_the_full_one() -> None:
    path = FULL_GOLDEN.parent / "checkpoint_manifest.json"
    if not path.is_file():
        pytest.skip("the full manifest is not beside this checkout")
    full = json.loads(path.read_text())["components"]
    text = gzip.decompress((SLIM_GOLDEN / "checkpoint_manifest.json.gz").read_bytes())
    for name, component in json.loads(text)["components"].items():
        assert {k: full[name][k] for k in component} == component


def test_slim_set_keeps_to_its_budget() -> None:
    assert sum(p.stat().st_size for p in SLIM_GOLDEN.rglob("*") if p.is_file()) <= BUDGET
