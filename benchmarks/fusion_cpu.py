"""Scene fusion on the CPU beside Open3D: the same cloud, steps and cores; part of the suite `cpu`.

Every provider runs in a process of its own, so that the growth of its resident memory is its own:

    OMP_NUM_THREADS=2 python -m benchmarks.cpu --only fuse_points

Open3D is optional (pip install open3d-cpu; on Debian with libusb-1.0-0): without it its rows are
left out, and the run says so.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Measurement, library_versions, version
from benchmarks.room import room
from gen3r_engine.fusion import FusionConfig, fuse_points

# Points and the side of the room's 49 frames that has at least as many valid pixels.
SIZES = ((1_000_000, 150), (4_000_000, 290))
REPEATS = {"open3d": 1, "python": 1, "native": 3}
CONFIG = FusionConfig()

Arrays = tuple[NDArray[np.float64], NDArray[np.uint8]]


def comparison() -> list[Measurement]:
    """Seconds and memory of outlier filter and voxel grid, for 1 M and 4 M points."""
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        for count, side in SIZES:
            file = Path(folder) / f"{count}.npz"
            points, colors = _cloud(count, side)
            np.savez(file, points=points, colors=colors)
            del points, colors
            for provider in REPEATS:
                found = _in_a_process(provider, file)
                if isinstance(found, str):
                    print(f"fuse_points        {provider:<14} skipped: {found}")
                    continue
                rows += _rows(provider, count, found)
    return rows


def _cloud(count: int, side: int) -> Arrays:
    scene = room(49, side, side)
    points, colors = scene.points[scene.mask].numpy(), scene.rgb[scene.mask].numpy()
    chosen = np.sort(np.random.default_rng(0).choice(len(points), count, replace=False))
    return points[chosen], colors[chosen]


def _rows(provider: str, count: int, found: dict[str, Any]) -> list[Measurement]:
    others = {"open3d": version("open3d-cpu"), "scipy": version("scipy")}
    config = {
        "kept": found["kept"],
        "cpu_seconds": found["cpu_seconds"],
        "bytes_a_point": round(found["growth"] / count, 1),
        "versions": library_versions() | others,
    }
    where = ("fuse_points", provider, str(count), "float64")
    return [
        Measurement(*where, "time", "s", found["seconds"], config=config),
        Measurement(*where, "memory", "GiB", [found["growth"] / 2**30], config=config),
    ]


def _in_a_process(provider: str, file: Path) -> dict[str, Any] | str:
    """What `measure` found, or why it could not run."""
    command = [sys.executable, "-m", "benchmarks.fusion_cpu", provider, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


def measure(provider: str, file: Path) -> dict[str, Any]:
    """Seconds, CPU seconds, and how far the resident memory rose above what the input takes."""
    with np.load(file) as arrays:
        points, colors = arrays["points"], arrays["colors"]
    run, take = PROVIDERS[provider]()
    run(take(points[:1000], colors[:1000]))  # libraries start their threads
    given = take(points, colors)
    before, peak = _resident(), Path("/proc/self/clear_refs")
    peak.write_text("5")  # the peak starts anew
    seconds, start = [], time.process_time()
    for _ in range(REPEATS[provider]):
        began = time.perf_counter()
        kept = run(given)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 1:
            growth = _resident("VmHWM") - before
    used = round((time.process_time() - start) / len(seconds), 2)
    return {"seconds": seconds, "cpu_seconds": used, "growth": growth, "kept": kept}


def _resident(what: str = "VmRSS") -> int:
    """Bytes, from Linux's /proc."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


Provider = tuple[Callable[[Any], int], Callable[[Any, Any], Any]]  # run, and convert before it


def _open3d() -> Provider:
    try:
        o3d = importlib.import_module("open3d")
    except (ImportError, OSError) as error:
        raise SystemExit(f"not installed ({error})") from error

    def take(points: NDArray[np.float64], colors: NDArray[np.uint8]) -> Any:
        cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
        cloud.colors = o3d.utility.Vector3dVector(colors / 255.0)
        return cloud

    def run(cloud: Any) -> int:
        left, _ = cloud.remove_statistical_outlier(CONFIG.nb_neighbors, CONFIG.std_ratio)
        left.voxel_down_sample(CONFIG.voxel_size)
        return len(left.points)

    return run, take


def _ours(backend: str) -> Callable[[], Provider]:
    config = FusionConfig(backend=backend)
    return lambda: (
        lambda given: fuse_points(given[0], given[1], config).counts["kept"],
        lambda points, colors: (points, colors),
    )


PROVIDERS = {"open3d": _open3d, "python": _ours("python"), "native": _ours("native")}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
