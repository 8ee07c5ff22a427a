"""The hoisted loop against the plain one, in float32 on a CPU at the embedded model's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.weights import build_transformer
from gen3r.nano import ARCHITECTURE
from gen3r.schedulers import Schedule, make_schedule
from gen3r.stages import denoise
from gen3r.transformer import Conditions, WanTransformer
from gen3r_engine.denoiser import Cancelled, Denoiser
from gen3r_kernels import Backends

SHAPE = (16, 2, 8, 16)  # 5 frames of 64 x 64 pixels
# Sums in another order, enlarged over the guided steps: 2e-7 to 1.6e-6 with three seeds of weights.
BOUND = 1e-5


@pytest.fixture(scope="module")
def transformer() -> WanTransformer:
    """Seeded weights like a trained model's, whose velocity depends on every condition."""
    return build_transformer(ARCHITECTURE.transformer, torch.float32, "cpu", Backends())


def make_conditions(
    transformer: WanTransformer, scenes: int, guided: bool, seed: int
) -> Conditions:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    repeats = 2 if guided else 1
    rows = repeats * scenes
    config = transformer.config
    texts = [normal(3 + 4 * (i % 3), config.text_dim) for i in range(rows)]
    frames, height, width = SHAPE[1:]
    shared = (
        normal(scenes, 17, config.clip_dim),
        normal(scenes, 20, frames, height, width),
        normal(scenes, 24, frames, 8 * height, 8 * width),
    )
    with torch.no_grad():
        return transformer.condition(texts, *(torch.cat([x] * repeats) for x in shared))


def noise(scenes: int, seed: int = 5) -> Tensor:
    return torch.randn(scenes, *SHAPE, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def plain(
    transformer: WanTransformer, given: Conditions, start: Tensor, schedule: Schedule
) -> Tensor:
    with torch.no_grad():
        return denoise(transformer, given, start, schedule, 5.0)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize(("scenes", "guided"), [(1, True), (2, True), (2, False)])
def test_equals_the_plain_loop(
    transformer: WanTransformer, solver: str, scenes: int, guided: bool
) -> None:
    schedule = make_schedule(solver, 4)
    given, start = make_conditions(transformer, scenes, guided, 0), noise(scenes)
    seen: list[tuple[int, float, Tensor]] = []
    denoiser = Denoiser(transformer, compiled=False, captured=False)
    ours = denoiser.run(given, start, schedule, 5.0, on_step=lambda i, t, x: seen.append((i, t, x)))
    expected = plain(transformer, given, start, schedule)
    assert error(ours, expected) < BOUND
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == list(schedule.timesteps)
    assert torch.equal(seen[-1][2], ours) and not torch.equal(seen[0][2], ours)


def test_second_request_leaves_nothing_of_the_first(transformer: WanTransformer) -> None:
    denoiser = Denoiser(transformer, compiled=False, captured=False)
    long, short = make_schedule("unipc", 5), make_schedule("unipc", 3)
    denoiser.run(make_conditions(transformer, 1, True, 1), noise(1, 1), long, 3.0)
    given, start = make_conditions(transformer, 1, True, 2), noise(1, 2)
    ours = denoiser.run(given, start, short, 5.0)
    assert error(ours, plain(transformer, given, start, short)) < BOUND


def test_a_scene_equals_its_solo_run(transformer: WanTransformer) -> None:
    schedule, start = make_schedule("euler", 3), noise(2)
    both = make_conditions(transformer, 2, True, 3)
    denoiser = Denoiser(transformer, compiled=False, captured=False)
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
        assert error(together[index : index + 1], alone) < BOUND


def test_cancel(transformer: WanTransformer) -> None:
    denoiser = Denoiser(transformer, compiled=False, captured=False)
    steps: list[int] = []
    with pytest.raises(Cancelled, match="before step 3 of 4"):
        denoiser.run(
            make_conditions(transformer, 1, True, 4),
            noise(1),
            make_schedule("euler", 4),
            5.0,
            on_step=lambda i, t, x: steps.append(i),
            cancelled=lambda: len(steps) == 2,
        )


def test_bad_input(transformer: WanTransformer) -> None:
    with pytest.raises(ValueError, match="captured=False"):
        Denoiser(transformer, compiled=False, captured=True)
    denoiser = Denoiser(transformer, compiled=False, captured=False)
    with pytest.raises(ValueError, match="2 rows of conditions for 3 scenes"):
        denoiser.run(
            make_conditions(transformer, 2, False, 0), noise(3), make_schedule("euler", 2), 5.0
        )
