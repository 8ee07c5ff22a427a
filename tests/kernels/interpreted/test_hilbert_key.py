"""hilbert_key's kernel in Triton's interpreter: it fills space without a jump, group by group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels.hilbert_key import hilbert_key, hilbert_key_reference

ORIGIN, CELLS = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def keys(points: Tensor, bits: int, origin: Tensor = ORIGIN, cells: Tensor = CELLS) -> Tensor:
    rows = torch.arange(len(points))
    return hilbert_key(points, rows, torch.zeros_like(rows), origin, cells, bits)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_step_of_the_key_is_a_step_to_a_neighbouring_cell(bits: int) -> None:
    side = torch.arange(2**bits, dtype=torch.float64) + 0.5
    grid = torch.cartesian_prod(side, side, side)
    key = keys(grid, bits)
    assert torch.equal(key, hilbert_key_reference(grid, ORIGIN[0], 1.0, bits))
    assert torch.equal(key.sort().values, torch.arange(8**bits))
    walk = grid[key.argsort()]
    assert ((walk[1:] - walk[:-1]).abs().sum(1) == 1).all()


def test_equals_the_reference_at_21_bits_and_clamps() -> None:
    points = torch.randn(300, 3, dtype=torch.float64)
    origin = torch.full((1, 3), -1.5, dtype=torch.float64)  # some points lie outside of the grid
    cells = torch.tensor([2**21 / 3.0], dtype=torch.float64)
    expected = hilbert_key_reference(points, origin[0], float(cells), 21)
    assert torch.equal(keys(points, 21, origin, cells), expected)


def test_groups_lead_the_key() -> None:
    points = torch.rand(64, 3, dtype=torch.float64)
    rows, groups = torch.arange(64).flip(0), torch.arange(64, dtype=torch.int32) % 2
    origin = torch.tensor([[0.0] * 3, [0.5] * 3], dtype=torch.float64)
    cells = torch.tensor([16.0, 32.0], dtype=torch.float64)
    key = hilbert_key(points, rows, groups, origin, cells, 4)
    for group in (0, 1):
        chosen = points[rows[groups == group]]
        expected = hilbert_key_reference(chosen, origin[group], float(cells[group]), 4)
        assert torch.equal(key[groups == group], expected + group * 8**4)


def test_refusals() -> None:
    points = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bits 22 must be in 1\.\.21"):
        keys(points, 22)
    with pytest.raises(ValueError, match="points of shape"):
        keys(points.float(), 3)
    with pytest.raises(ValueError, match="one shape"):
        hilbert_key(points, torch.arange(2), torch.zeros(1), ORIGIN, CELLS, 3)
    assert len(keys(points[:0], 3)) == 0


def test_opcheck() -> None:
    rows = torch.arange(4)
    arguments = (torch.rand(4, 3).double(), rows, rows * 0, ORIGIN, CELLS, 5)
    torch.library.opcheck(torch.ops.gen3r.hilbert_key.default, arguments)
