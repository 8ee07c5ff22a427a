"""The C++ extension against the Python it stands for: the same bytes, the same errors.

Tests of the extension itself are skipped where it is not built; the Python paths are tested always.
"""

from __future__ import annotations

import os
import re
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from gen3r.run import to_bytes
from gen3r_engine import depth_colors as colors
from gen3r_engine import native as loader
from gen3r_engine import npz, packing
from gen3r_engine.native import native, why_missing
from gen3r_engine.npz import write_npz
from gen3r_engine.packing import pack_frames, pack_frames_reference

BUILT = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")
PATHS = ["python", pytest.param("native", marks=BUILT)]


def extension() -> ModuleType:
    found = native()
    assert found is not None
    return found


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two implementations the modules under test see."""
    name: str = request.param
    if name == "python":
        for module in (npz, packing, colors):
            monkeypatch.setattr(module, "native", lambda: None)
    return name


# ------------------------------------------------------------------------------------ the extension


def test_why_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (why_missing() == "") == (native() is not None)
    for fault, text in (
        (ModuleNotFoundError("No module named 'gen3r_engine._C'"), "not built"),
        (ImportError("libgomp.so.1: cannot open"), "does not load.*libgomp"),
    ):

        def fail(name: str, fault: Exception = fault) -> ModuleType:
            raise fault

        monkeypatch.setattr(loader.importlib, "import_module", fail)
        found, reason = loader._load.__wrapped__()
        assert found is None and re.match(text, reason)
        assert "python setup.py build_ext --inplace" in reason


def test_an_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("gen3r_engine._C")
    old.API = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loader.importlib, "import_module", lambda name: old)
    found, reason = loader._load.__wrapped__()
    assert found is None and "other sources (API 0" in reason


# ------------------------------------------------------------------------------------------ packing


def all_halves(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a 16-bit type (one left out, to make it [..., 3])."""
    return torch.arange(65_535, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(5, -1, 3)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_as_the_pipeline_packs(path: str, dtype: torch.dtype) -> None:
    frames = torch.rand((3, 19, 23, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = to_bytes(frames).numpy()
    planes = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for given in (frames, planes, frames[:, ::2, 1::3], frames[0], frames[0, 0], frames[None]):
        wanted = to_bytes(given).numpy()
        for threads in (1, 3):
            found = pack_frames(given, threads=threads)
            assert found.dtype == np.uint8 and np.array_equal(found, wanted)
    assert np.array_equal(pack_frames(planes), expected)
    assert pack_frames(frames[:0]).shape == (0, 19, 23, 3)


@BUILT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packing_of_every_half_is_the_references(dtype: torch.dtype) -> None:
    halves = all_halves(dtype)
    assert np.array_equal(pack_frames(halves), pack_frames_reference(halves))


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_packing_beyond_its_range(path: str) -> None:
    frames = torch.tensor([[-1.0, 2.0, float("nan")], [float("inf"), float("-inf"), 1e30]])
    assert pack_frames(frames).tolist() == [[0, 255, 0], [255, 0, 255]]
    for bad in (torch.zeros(3, 4), torch.zeros(2, 3, dtype=torch.float64), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"frames must be \[..., 3\]"):
            pack_frames(bad)
    with pytest.raises(ValueError, match="frames are on meta"):
        pack_frames(torch.zeros(3, device="meta"))


@BUILT
@pytest.mark.parametrize("kind", ["noise", "constant", "nothing", "large", "empty"])
def test_depth_colours_are_the_references(kind: str) -> None:
    random = np.random.default_rng(0)
    depth = random.uniform(0.2, 20.0, (3, 61, 47)).astype(np.float32)
    depth.flat[::13], depth.flat[1::17], depth.flat[2::19] = 0.0, np.nan, -np.inf
    depth.flat[3], depth.flat[4] = 1e-42, np.inf
    if kind == "constant":
        depth[np.isfinite(depth) & (depth > 0)] = 2.5
    if kind == "nothing":
        depth[:] = np.nan
    if kind == "large":  # more than the percentiles look at, so every second one
        depth = random.uniform(0.2, 20.0, (5, 640, 640)).astype(np.float32)
    if kind == "empty":
        depth = depth[:0]
    found = colors.depth_colors(depth, threads=3)
    assert np.array_equal(found, colors.depth_colors_reference(depth))
    flipped = depth[:, ::-1]  # strided
    assert np.array_equal(colors.depth_colors(flipped), found[:, ::-1]) or kind == "large"


# ---------------------------------------------------------------------------------------------- npz

ARRAYS = {
    "rgb": np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3),
    "depth": np.linspace(0, 1, 400_000, dtype=np.float32).reshape(20, -1),
    "points": np.asfortranarray(np.arange(12.0).reshape(4, 3)),
    "mask": np.array([True, False]),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 3), dtype=np.float64),
    "text ü": np.array(["a", "bcd"]),
}


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("compress", [False, True])
def test_npz_reads_back(path: str, compress: bool, tmp_path: Path) -> None:
    for threads in (1, 3):
        file = tmp_path / f"{threads}.npz"
        write_npz(file, ARRAYS, compress=compress, threads=threads)
        with np.load(file) as found:
            assert list(found) == list(ARRAYS)
            for name, array in ARRAYS.items():
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert np.array_equal(found[name], array)
        stored = sum(array.nbytes for array in ARRAYS.values())
        assert (file.stat().st_size < stored) == compress
    write_npz(file, {})
    with np.load(file) as found:
        assert list(found) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may not grow beyond 64 KiB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_npz_on_a_full_disk(path: str, tmp_path: Path, small_files: None) -> None:
    file = tmp_path / "scene.npz"
    with pytest.raises(OSError) as raised:
        write_npz(file, ARRAYS)
    assert raised.value.errno is not None and raised.value.filename == str(file)
    assert not file.exists()
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left"):
            write_npz("/dev/full", ARRAYS)
        assert os.path.exists("/dev/full")


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_npz_of_objects_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bad' holds objects"):
        write_npz(tmp_path / "x.npz", {"bad": np.array([{}])})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- clouds


@BUILT
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_and_arrays_of_a_cloud(dtype: type, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    points = random.normal(size=(70_001, 3)).astype(dtype)
    tints = random.integers(0, 256, points.shape, dtype=np.uint8)
    normals = random.normal(size=points.shape).astype(np.float32)
    table = np.linspace(0, 1, 256).astype(np.float32)
    single, file = points.astype(np.float32), tmp_path / "x"
    for given in (normals, None):
        parts = [single] if given is None else [single, given]
        with file.open("wb", buffering=0) as out:
            size = extension().ply_rows(out.fileno(), points, tints, given)
        rows = np.concatenate([part.view(np.uint8).reshape(-1, 12) for part in parts] + [tints], 1)
        assert size == rows.size and file.read_bytes() == rows.tobytes()
        with file.open("wb", buffering=0) as out:
            extension().glb_points(out.fileno(), points, tints, given, table)
        assert file.read_bytes() == b"".join(p.tobytes() for p in [*parts, table[tints]])
    least, most = extension().bounds(points)
    assert np.array_equal(least, single.min(0)) and np.array_equal(most, single.max(0))


@BUILT
def test_wrong_clouds_say_what_is_wrong(tmp_path: Path) -> None:
    points, tints = np.zeros((4, 3)), np.zeros((4, 3), dtype=np.uint8)
    rows = extension().ply_rows
    for bad, match in (
        ((np.zeros((4, 2)), tints), r"points must be \[N, 3\], got float64 \[4, 2\]"),
        ((np.zeros((4, 3), dtype=int), tints), "points must be a C-contiguous array of float32"),
        ((points[::2], tints[:2]), "points must be a C-contiguous"),
        ((points, tints[:3]), "must be as many"),
        ((points, points), "colors must be a C-contiguous array of uint8"),
        ((points, tints, points), "normals must be a C-contiguous array of float32"),
    ):
        with pytest.raises(ValueError, match=match):
            rows(-1, *bad)
    with pytest.raises(OSError) as raised:
        rows(-1, points, tints, None, "gone.ply")
    assert raised.value.filename == "gone.ply"
    for bad_points in (np.zeros((0, 3)), np.array([[0.0, np.nan, 0.0]]), np.array([[1e300] * 3])):
        with pytest.raises(ValueError, match="point"):
            extension().bounds(bad_points)


@BUILT
def test_the_interpreter_runs_on_while_the_extension_works() -> None:
    """A thread that packs holds no lock: the main one is never kept waiting for all of it."""
    depth = np.random.default_rng(0).uniform(1, 2, (20, 560, 560)).astype(np.float32)
    thread = threading.Thread(target=colors.depth_colors, args=(depth,), kwargs={"threads": 1})
    start = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < 0.5 * (time.perf_counter() - start), "the lock was held for most of the call"
