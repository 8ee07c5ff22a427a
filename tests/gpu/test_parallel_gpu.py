"""Sharded training in bf16 on a GPU (NCCL, one rank) beside a module that is not sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def test_sharded_bf16(tmp_path: Path) -> None:
    """Sums are bf16 in one and float32 in the other: a few times bf16's rounding, 2^-8, apart."""
    ranks = run_ranks(tmp_path, ["gpu"], seconds=300, ranks=min(2, torch.cuda.device_count()))
    for one in ranks:
        sharded, plain, sharded_adapter, plain_adapter = one["gpu"]["losses"]
        assert sharded == pytest.approx(plain, rel=1e-2)
        assert sharded_adapter == pytest.approx(plain_adapter, rel=1e-2)
    assert max(ranks[0]["gpu"]["errors"].values()) < 0.03, ranks[0]["gpu"]["errors"]
