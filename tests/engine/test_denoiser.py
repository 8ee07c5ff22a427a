"""The hoisted loop against the plain one, in float32 on a CPU with the embedded model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import Schedule, make_schedule
from gen3r.stages import denoise
from gen3r.transformer import Conditions
from gen3r_engine.denoiser import Cancelled, Denoiser

SHAPE = (16, 2, 8, 16)  # 5 frames of 64 x 64 pixels


@pytest.fixture(scope="module")
def pipeline() -> Gen3RPipeline:
    return build_nano()


def make_conditions(pipeline: Gen3RPipeline, scenes: int, guided: bool, seed: int) -> Conditions:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    repeats = 2 if guided else 1
    rows = repeats * scenes
    texts = [normal(3 + 4 * (i % 3), 96) for i in range(rows)]
    frames, height, width = SHAPE[1:]
    shared = (
        normal(scenes, 17, 96),
        normal(scenes, 20, frames, height, width),
        normal(scenes, 24, frames, 8 * height, 8 * width),
    )
    with torch.no_grad():
        return pipeline.transformer.condition(texts, *(torch.cat([x] * repeats) for x in shared))


def noise(scenes: int, seed: int = 5) -> Tensor:
    return torch.randn(scenes, *SHAPE, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def plain(pipeline: Gen3RPipeline, given: Conditions, start: Tensor, schedule: Schedule) -> Tensor:
    with torch.no_grad():
        return denoise(pipeline.transformer, given, start, schedule, 5.0)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize(("scenes", "guided"), [(1, True), (2, True), (2, False)])
def test_equals_the_plain_loop(
    pipeline: Gen3RPipeline, solver: str, scenes: int, guided: bool
) -> None:
    schedule = make_schedule(solver, 4)
    given, start = make_conditions(pipeline, scenes, guided, 0), noise(scenes)
    seen: list[tuple[int, float, Tensor]] = []
    denoiser = Denoiser(pipeline.transformer, compiled=False, captured=False)
    ours = denoiser.run(given, start, schedule, 5.0, on_step=lambda i, t, x: seen.append((i, t, x)))
    expected = plain(pipeline, given, start, schedule)
    assert error(ours, expected) < 1e-5
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == list(schedule.timesteps)
    assert torch.equal(seen[-1][2], ours) and not torch.equal(seen[0][2], ours)


def test_second_request_leaves_nothing_of_the_first(pipeline: Gen3RPipeline) -> None:
    denoiser = Denoiser(pipeline.transformer, compiled=False, captured=False)
    long, short = make_schedule("unipc", 5), make_schedule("unipc", 3)
    denoiser.run(make_conditions(pipeline, 1, True, 1), noise(1, 1), long, 3.0)
    given, start = make_conditions(pipeline, 1, True, 2), noise(1, 2)
    ours = denoiser.run(given, start, short, 5.0)
    assert error(ours, plain(pipeline, given, start, short)) < 1e-5


def test_a_scene_equals_its_solo_run(pipeline: Gen3RPipeline) -> None:
    schedule, start = make_schedule("euler", 3), noise(2)
    both = make_conditions(pipeline, 2, True, 3)
    denoiser = Denoiser(pipeline.transformer, compiled=False, captured=False)
    together = denoiser.run(both, start, schedule, 5.0)
    for index in range(2):
        rows = [index, index + 2]
        assert both.cameras is not None
        solo = Conditions(
            both.text[rows],
            both.text_lengths[rows],
            both.image[rows],
            both.cameras[rows],
            both.control[rows],
        )
        alone = denoiser.run(solo, start[index : index + 1], schedule, 5.0)
        assert error(together[index : index + 1], alone) < 1e-6


def test_cancel(pipeline: Gen3RPipeline) -> None:
    denoiser = Denoiser(pipeline.transformer, compiled=False, captured=False)
    steps: list[int] = []
    with pytest.raises(Cancelled, match="before step 3 of 4"):
        denoiser.run(
            make_conditions(pipeline, 1, True, 4),
            noise(1),
            make_schedule("euler", 4),
            5.0,
            on_step=lambda i, t, x: steps.append(i),
            cancelled=lambda: len(steps) == 2,
        )


def test_bad_input(pipeline: Gen3RPipeline) -> None:
    with pytest.raises(ValueError, match="captured=False"):
        Denoiser(pipeline.transformer, compiled=False, captured=True)
    denoiser = Denoiser(pipeline.transformer, compiled=False, captured=False)
    with pytest.raises(ValueError, match="2 rows of conditions for 3 scenes"):
        denoiser.run(
            make_conditions(pipeline, 2, False, 0), noise(3), make_schedule("euler", 2), 5.0
        )
