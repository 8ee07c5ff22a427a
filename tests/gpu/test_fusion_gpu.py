"""Scene fusion on a GPU: neighbours against all pairs, hard clouds, the same cloud as by numpy."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.room import room
from gen3r.scene import Scene
from gen3r_engine.fusion import REMOVE_FAR, FusionConfig, fuse_points
from gen3r_engine.fusion_cuda import fuse_cuda
from gen3r_kernels.hilbert_key import hilbert_key, hilbert_key_reference
from gen3r_kernels.neighbor_distance import neighbor_distance
from gen3r_kernels.voxel_average import voxel_average, voxel_average_reference
from tests.conftest import golden_folders
from tests.golden_fixtures.golden import Golden
from tests.golden_fixtures.test_pointcloud import KIND, config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ROUNDING = 2.0**-21  # of a float32 distance from differences in two parts
COUNT = 300_000


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device="cuda")


def check_sample(points: Tensor, k: int, rounding: float = ROUNDING) -> None:
    """Mean and farthest of 200 points against all others in float64."""
    ours = neighbor_distance(points, k)
    for rows in torch.randint(len(points), (200,), device="cuda").split(50):
        pairs = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        exact = pairs.topk(k, dim=1, largest=False).values
        for mine, theirs in zip(ours, (exact.mean(1), exact[:, -1]), strict=True):
            torch.testing.assert_close(mine[rows], theirs, rtol=rounding, atol=0)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return room(frames=6, height=224, width=224)


@pytest.mark.parametrize("k", [1, 2, 11, 25, 64])
def test_neighbors_of_a_scene(scene: Scene, k: int) -> None:
    check_sample(scene.points[scene.mask].cuda(), k)


def test_neighbors_of_few_points() -> None:
    for count in (1, 2, 24, 25, 31, 33, 1000):
        check_sample(normal(count, 3), min(count, 25))


HARD = {
    "coinciding": lambda: torch.ones(COUNT, 3, dtype=torch.float64, device="cuda"),
    "a thousand copies": lambda: normal(COUNT // 1000, 3).repeat(1000, 1),
    "two scales": lambda: torch.cat([normal(COUNT // 2, 3) * 1e-6, normal(COUNT // 2, 3)]),
    "one far point": lambda: torch.cat([normal(COUNT, 3), normal(1, 3) * 1e9]),
    "few far points": lambda: torch.cat([normal(COUNT, 3), 1e3 + normal(30, 3) * 1e2]),
    "line": lambda: normal(COUNT, 1) * torch.ones(1, 3, dtype=torch.float64, device="cuda"),
    "sphere": lambda: torch.cat([F.normalize(normal(COUNT, 3), dim=1), normal(100, 3) * 1e-3]),
    "far from the origin": lambda: normal(COUNT, 3) + 5e6,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_clouds_are_exact_and_fast(name: str) -> None:
    points = HARD[name]()
    check_sample(points, 25)
    torch.cuda.synchronize()
    start = time.perf_counter()
    neighbor_distance(points, 25)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1.0  # all pairs would take a minute and more


def test_keys_equal_the_reference() -> None:
    points, rows = normal(5000, 3), torch.arange(5000, device="cuda")
    origin = torch.full((1, 3), -5.0, dtype=torch.float64, device="cuda")
    cells = torch.full((1,), 2**21 / 10, dtype=torch.float64, device="cuda")
    keys = hilbert_key(points, rows, torch.zeros_like(rows), origin, cells, 21)
    assert torch.equal(keys, hilbert_key_reference(points, origin[0], float(cells), 21))


@pytest.mark.parametrize("size", [0.02, 0.3, 100.0])
def test_voxels_equal_the_reference_and_do_not_depend_on_the_run(size: float) -> None:
    points, directions = normal(COUNT, 3), F.normalize(normal(COUNT, 3), dim=1).float()
    colors = torch.randint(0, 256, (COUNT, 3), dtype=torch.uint8, device="cuda")
    xyz, rgb, normals = voxel_average(points, colors, size, directions)
    again = voxel_average(points, colors, size, directions)
    exact = voxel_average_reference(points, colors, size, directions)
    assert normals is not None and again[2] is not None and exact[2] is not None
    assert torch.equal(xyz, again[0]) and torch.equal(rgb, again[1])
    assert torch.equal(normals, again[2])
    torch.testing.assert_close(xyz, exact[0], rtol=1e-12, atol=1e-13)
    assert (rgb.int() - exact[1].int()).abs().max() <= 1
    torch.testing.assert_close(normals, exact[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(backend="python"),
        FusionConfig(backend="python", near_percentile=80.0, voxel_size=0.02),
        FusionConfig(backend="python", voxel_size=None, far_percentile=80.0),
    ],
    ids=["default", "near", "no voxels"],
)
def test_the_same_cloud_as_on_the_cpu(scene: Scene, config: FusionConfig) -> None:
    points, colors = scene.points[scene.mask], scene.rgb[scene.mask]
    expected = fuse_points(points.numpy(), colors.numpy(), config)
    found = fuse_cuda(points.cuda(), colors.cuda(), config)
    assert found.points.shape == expected.points.shape
    np.testing.assert_allclose(found.points.cpu(), expected.points, rtol=1e-12, atol=1e-13)
    assert np.array_equal(found.colors.cpu(), expected.colors)
    assert found.counts["given"] - found.counts["outliers"] >= found.counts["kept"] > 0


def test_stored_clouds(request: pytest.FixtureRequest) -> None:
    """Upstream's rows for every stored option set; float colours are rounded before, here."""
    found = [g for f in golden_folders(request.config) if (g := Golden(f, KIND)).path.is_file()]
    if not found:
        pytest.skip(f"no {KIND}.safetensors")
    golden = found[0]
    points, colors = golden["in/points"].cuda(), golden["in/rgbs"].cuda()
    for case in golden.cases(r"(\w+)/points"):
        if case == "in":
            continue
        cloud = fuse_points(points, colors, config_of(case))
        assert cloud.backend == "cuda"
        order = np.lexsort(cloud.points.T[::-1])
        expected = golden[f"{case}/points"].double().numpy()
        np.testing.assert_allclose(cloud.points[order], expected, rtol=1e-6, atol=1e-6)
        colours = 255 * golden[f"{case}/colors"].double().numpy()
        assert np.abs(cloud.colors[order] - colours).max() <= 1.01


def test_memory_stays_below_200_bytes_a_point(scene: Scene) -> None:
    points = scene.points.cuda().reshape(-1, 3).repeat(10, 1)
    points += 1e-3 * normal(*points.shape)
    colors = scene.rgb.cuda().reshape(-1, 3).repeat(10, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fuse_cuda(points, colors, REMOVE_FAR, valid=scene.mask.cuda().flatten().repeat(10))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 200 * len(points)
