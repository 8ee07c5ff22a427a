"""Memory planned in batches, and running out of it told with what helps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gen3r.scene import SceneRequest
from gen3r_engine.config import EngineConfig
from gen3r_engine.memory import (
    WORKING,
    OutOfMemory,
    advice,
    guard,
    limit_process,
    needed_gib,
    plan_batches,
    working_gib,
)

PHOTO = np.zeros((60, 60, 3), np.uint8)
FULL = (49, 560, 560)


def request(frames: int = 49, size: int = 560) -> SceneRequest:
    return SceneRequest([PHOTO], "a room", num_frames=frames, height=size, width=size)


def sizes(batches: list[list[SceneRequest]]) -> list[int]:
    return [len(batch) for batch in batches]


def test_batches_are_neighbours_of_one_shape_in_order() -> None:
    requests = [request(5), request(5), request(9), request(5), request(5), request(5)]
    batches = plan_batches(requests, EngineConfig(max_batch=2), 18.0, None)
    assert sizes(batches) == [2, 1, 2, 1]
    assert [r for batch in batches for r in batch] == requests


def test_batches_are_split_where_memory_ends() -> None:
    requests = [request() for _ in range(5)]
    config = EngineConfig(max_batch=4)
    three = needed_gib(*FULL, 3, 18.0)
    assert sizes(plan_batches(requests, config, 18.0, 500.0)) == [4, 1]
    assert sizes(plan_batches(requests, config, 18.0, three)) == [3, 2]
    assert sizes(plan_batches(requests, config, 18.0, three - 0.01)) == [2, 2, 1]
    assert sizes(plan_batches(requests, config, 18.0, needed_gib(*FULL, 1, 18.0))) == [1] * 5


def test_what_fits_no_tier_at_all_names_stage_need_and_tier() -> None:
    config = EngineConfig(residency="resident")
    with pytest.raises(ValueError, match="need about") as error:
        plan_batches([request()], config, 17.8, 23.0)
    for part in ("49 frames of 560 x 560", "17.8 GiB of weights", "decode geometry", "'24gb'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="fewer frames"):
        plan_batches([request()], EngineConfig(residency="12gb", overlap=False), 6.0, 7.0)
    with pytest.raises(ValueError, match="no requests"):
        plan_batches([], config, 1.0, 2.0)


def test_overlap_is_named_where_it_is_what_does_not_fit() -> None:
    alone = needed_gib(*FULL, 1, 6.0, overlap=False)
    with pytest.raises(ValueError, match="use overlap=False"):
        plan_batches([request()], EngineConfig(), 6.0, alone)
    assert sizes(plan_batches([request()], EngineConfig(overlap=False), 6.0, alone)) == [1]


def test_estimates_grow_with_what_they_depend_on() -> None:
    assert needed_gib(*FULL, 2, 6.0) > needed_gib(*FULL, 1, 6.0)
    assert needed_gib(49, 280, 280, 1, 0.0) < needed_gib(*FULL, 1, 0.0)
    for stage in WORKING:
        assert working_gib(stage, *FULL, dtype="float32") == 2 * working_gib(stage, *FULL)
    with pytest.raises(ValueError, match="known: encode text"):
        working_gib("paint", *FULL)


def test_guard_names_stage_need_and_what_fits() -> None:
    with (
        pytest.raises(OutOfMemory) as error,
        guard("denoise", 31.5, "resident", batch=4, budget_gib=23.0),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    told = error.value
    assert (told.stage, told.needed) == ("denoise", 31.5)
    for part in ("stage 'denoise'", "31.5 GiB", "a batch of 2", "residency '24gb'", "2 GiB."):
        assert part in str(told)
    assert "More" not in str(told) and isinstance(told.__cause__, torch.cuda.OutOfMemoryError)


def test_guard_with_a_list_of_tiers_and_other_errors() -> None:
    with (
        pytest.raises(OutOfMemory, match="use residency '12gb', or fewer frames"),
        guard("decode geometry", tiers=["12gb"]),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(KeyError), guard("denoise", 1.0):
        raise KeyError("x")
    with guard("denoise"):
        pass


def test_advice_leaves_out_what_does_not_fit() -> None:
    assert "'12gb'" in advice("resident", budget_gib=15.0)
    assert "residency" not in advice("12gb") and "residency" not in advice("resident", 1, 2.0)


def test_process_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: set_to.append(share)
    )
    limit_process(20.0, torch.device("cuda", 0))
    limit_process(100.0, torch.device("cuda", 0))
    limit_process(None, torch.device("cuda", 0))
    limit_process(20.0, torch.device("cpu"))
    assert set_to == [0.25, 1.0, 1.0]
