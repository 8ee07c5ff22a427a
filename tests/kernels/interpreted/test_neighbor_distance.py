"""neighbor_distance's kernel in Triton's interpreter, against all pairs in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends
from gen3r_kernels import neighbor_index as indexing
from gen3r_kernels.neighbor_distance import neighbor_distance, neighbor_distance_reference
from gen3r_kernels.neighbor_distance_kernel import neighbor_kernel
from gen3r_kernels.neighbor_index import build_index

TRITON = Backends(operators="triton")
ROUNDING = 2.0**-21  # of a float32 distance from differences in two parts


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def two_scales() -> Tensor:
    return torch.cat([normal(40, 3) * 1e-7 + 3, normal(30, 3)])


def far_outlier() -> Tensor:
    return torch.cat([normal(69, 3), torch.full((1, 3), 1e9, dtype=torch.float64)])


def clouds() -> dict[str, Tensor]:
    return {
        "even": normal(70, 3),
        "two scales": two_scales(),
        "far outlier": far_outlier(),
        "coinciding": torch.ones(70, 3, dtype=torch.float64),
        "pairs": normal(20, 3).repeat(2, 1),
        "line": normal(40, 1) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "far from the origin": normal(40, 3) + 5e6,
        "tiny": normal(40, 3) * 1e-30,
        "huge": normal(40, 3) * 1e30,
        "float32": normal(40, 3).float(),
        "one leaf": normal(9, 3),
    }


@pytest.mark.parametrize("name", clouds())
def test_equals_all_pairs(name: str) -> None:
    points = clouds()[name]
    ours = neighbor_distance(points, 3, backends=TRITON)
    for mine, exact in zip(ours, neighbor_distance_reference(points, 3), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, exact, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 2), (33, 1), (40, 33)])
def test_number_of_neighbours(count: int, k: int) -> None:
    points = normal(count, 3)
    mean, farthest = neighbor_distance(points, k, backends=TRITON)
    exact, last = neighbor_distance_reference(points, k)
    torch.testing.assert_close(mean, exact, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(farthest, last, rtol=ROUNDING, atol=0)


def test_several_nodes() -> None:
    """More than 32 leaves: the descent passes all three levels of the tree, from the first leaf."""
    points = normal(33 * 32 + 5, 3)
    index = build_index(points)
    assert [level.count for level in index.levels] == [34, 2, 1]
    assert torch.equal(index.order.sort().values, torch.arange(len(points), dtype=torch.int32))
    mean, farthest = torch.zeros(2, len(points), dtype=torch.float64)
    boxes = [level.boxes for level in index.levels]
    counts = [level.count for level in index.levels]
    neighbor_kernel[(1,)](
        *(index.points, *boxes, index.order, mean, farthest, len(points), *counts, index.scale),
        *(3, 32, 32, 4),
    )
    first = index.order[:32].long()
    exact, last = neighbor_distance_reference(points, 3)
    torch.testing.assert_close(mean[first], exact[first], rtol=ROUNDING, atol=0)
    torch.testing.assert_close(farthest[first], last[first], rtol=ROUNDING, atol=0)


def test_an_index_serves_several_calls() -> None:
    points = normal(40, 3)
    index = build_index(points)
    for k in (2, 3):
        exact = neighbor_distance_reference(points, k)
        for mine, theirs in zip(neighbor_distance(index, k), exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("cloud", [two_scales, far_outlier])
def test_crowded_cells_are_refined(
    cloud: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in the order are neighbours in space at both scales: leaves stay small."""
    monkeypatch.setattr(indexing, "RUN", 8)
    torch.manual_seed(0)
    points = cloud()
    order = build_index(points).order.long()
    jumps = (points[order][1:] - points[order][:-1]).norm(dim=1)
    dense = points.norm(dim=1) < 1e6 if cloud is far_outlier else points.sum(1) > 8.99999
    inside = dense[order][1:] & dense[order][:-1]
    spread = (points[dense] - points[dense].mean(0)).norm(dim=1).median()
    assert jumps[inside].median() < spread


def test_refusals() -> None:
    points = normal(10, 3)
    with pytest.raises(ValueError, match=r"k 11 must be in 1\.\.10"):
        neighbor_distance(points, 11)
    with pytest.raises(ValueError, match=r"expected \[N, 3\]"):
        neighbor_distance(points[0], 1)
    with pytest.raises(ValueError, match="at most 64 neighbours"):
        neighbor_distance(normal(70, 3), 65, backends=TRITON)
    with pytest.raises(ValueError, match="not finite"):
        build_index(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="with N >= 1"):
        build_index(points[:0])


def test_opcheck() -> None:
    index = build_index(normal(20, 3))
    boxes = [level.boxes for level in index.levels]
    counts = [level.count for level in index.levels]
    arguments = (index.points, *boxes, index.order, counts, index.scale, 1)
    torch.library.opcheck(torch.ops.gen3r.neighbor_distance.default, arguments)
