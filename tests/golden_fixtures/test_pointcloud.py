"""Golden fixture `pointcloud`: upstream's PLY export for several option sets, rows sorted by x, y,
z.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from gen3r_engine.fusion import REMOVE_FAR, FusionConfig, fuse_points
from gen3r_engine.native import native, why_missing
from tests.golden_fixtures.golden import Golden

KIND = "pointcloud"
NEEDS_NATIVE = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")
PATHS = ["python", pytest.param("native", marks=NEEDS_NATIVE)]


def config_of(case: str) -> FusionConfig:
    """The options that a case's name spells: ``far_003``, ``percentile50_novoxel``, ..."""
    start, _, voxel = case.partition("_")
    percentile = re.fullmatch(r"percentile(\d+)", start)
    config = replace(
        REMOVE_FAR if start == "far" else FusionConfig(),
        filter_outliers=start != "nofilter",
        near_percentile=float(percentile.group(1)) if percentile else 0.0,
    )
    return replace(config, voxel_size=None if voxel == "novoxel" else int(voxel) / 1000)


@pytest.mark.parametrize("backend", PATHS)
def test_every_option_set_gives_upstreams_rows(golden: Golden, backend: str) -> None:
    points, colors = golden["in/points"], golden["in/rgbs"]
    for case in golden.cases(r"(\w+)/points"):
        if case == "in":
            continue
        cloud = fuse_points(points, colors, replace(config_of(case), backend=backend))
        order = np.lexsort(cloud.points.T[::-1])
        golden.check(f"{case}/points", torch.from_numpy(cloud.points[order]), axes=())
        golden.check(f"{case}/colors", torch.from_numpy(cloud.colors[order] / 255.0), axes=())
