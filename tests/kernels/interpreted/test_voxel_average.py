"""voxel_average's kernel in Triton's interpreter, against torch's index_add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends
from gen3r_kernels.voxel_average import voxel_average, voxel_average_reference

TRITON = Backends(operators="triton")


def cloud(count: int) -> tuple[Tensor, Tensor, Tensor]:
    normals = torch.nn.functional.normalize(torch.randn(count, 3), dim=1)
    colors = torch.randint(0, 256, (count, 3), dtype=torch.uint8)
    return torch.randn(count, 3, dtype=torch.float64), colors, normals


@pytest.mark.parametrize("count", [0, 1, 500])
@pytest.mark.parametrize("size", [0.5, 2.0, 100.0])  # 100: one cell, in parts
@pytest.mark.parametrize("with_normals", [False, True])
def test_equals_the_reference(count: int, size: float, with_normals: bool) -> None:
    points, colors, normals = cloud(count)
    given = normals if with_normals else None
    ours = voxel_average(points, colors, size, given, backends=TRITON)
    exact = voxel_average_reference(points, colors, size, given)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-13, atol=1e-14)
    assert (ours[1].int() - exact[1].int()).abs().max() <= 1 if count else len(ours[1]) == 0
    if with_normals:
        torch.testing.assert_close(ours[2], exact[2], rtol=1e-6, atol=1e-6)
    else:
        assert ours[2] is None and exact[2] is None


def test_cells_are_ordered_and_start_at_the_least_corner() -> None:
    points = torch.tensor([[1.2, 0, 0], [0, 0, 1.1], [0, 0.4, 0.2], [0, 1.0, 0], [0, 0, 0]])
    points = points.double() + 7
    colors = torch.arange(15, dtype=torch.uint8).view(5, 3)
    means, mean_colors, _ = voxel_average(points, colors, 1.0, backends=TRITON)
    expected = torch.stack([points[[2, 4]].mean(0), points[1], points[3], points[0]])
    torch.testing.assert_close(means, expected, rtol=1e-15, atol=0)
    assert mean_colors[0].tolist() == [9, 10, 11] and mean_colors[3].tolist() == [0, 1, 2]


def test_opposite_normals_are_unknown() -> None:
    normals = torch.tensor([[0.0, 0, 1], [0, 0, -1]])
    points, colors = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.uint8)
    _, _, found = voxel_average(points, colors, 1.0, normals, backends=TRITON)
    assert found is not None and found.tolist() == [[0, 0, 0]]


def test_refusals() -> None:
    points, colors, _ = cloud(4)
    points[0] = 1e12
    with pytest.raises(ValueError, match="larger voxels"):
        voxel_average(points, colors, 1e-9, backends=TRITON)
    with pytest.raises(ValueError, match="expected contiguous"):
        voxel_average(points, colors.int(), 1e9, backends=TRITON)


def test_opcheck() -> None:
    points, colors, normals = cloud(6)
    begin, length = torch.tensor([0, 4]), torch.tensor([4, 2])
    arguments = (points, colors, normals, torch.arange(6), begin, length)
    torch.library.opcheck(torch.ops.gen3r.voxel_sums.default, arguments)
