"""The embedded model's folder, and the seeded weights that training begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen3r.checkpoint import checked_reports, read_own_values
from gen3r.components import COMPONENTS
from gen3r.config import Gen3RConfig
from gen3r.nano import ARCHITECTURE, EMBEDDED, NANO, build_nano, build_untrained, main
from gen3r.pipeline import Gen3RPipeline


def without_statistics(config: Gen3RConfig) -> Gen3RConfig:
    """The sizes alone: latents' statistics are measured when the autoencoders are trained."""
    plain = {name: getattr(ARCHITECTURE.wan_vae, name) for name in ("latents_mean", "latents_std")}
    return replace(
        config,
        wan_vae=replace(config.wan_vae, **plain),
        geo_adapter=replace(config.geo_adapter, **plain),
    )


def test_the_embedded_folder_is_whole_small_and_of_the_known_sizes() -> None:
    assert all(report.ok for report in checked_reports(EMBEDDED))
    assert without_statistics(NANO) == ARCHITECTURE
    assert all(std > 0 for part in (NANO.wan_vae, NANO.geo_adapter) for std in part.latents_std)
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) <= 16 * 2**20
    pipeline = build_nano()
    assert pipeline.config == NANO and pipeline.dtype == torch.float32
    assert pipeline.untrained is bool(read_own_values(EMBEDDED).get("untrained", False))


def test_untrained_weights_are_those_of_their_seed() -> None:
    first, again, other = (build_untrained(seed) for seed in (3, 3, 4))
    assert first.untrained and first.config is ARCHITECTURE
    for name in COMPONENTS:
        states = [getattr(p, name).state_dict() for p in (first, again, other)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_the_command_writes_a_folder_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "nano")])
    assert "M parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # there is one already
        main([str(tmp_path / "nano")])
    assert "nano" in capsys.readouterr().err
    loaded = Gen3RPipeline.from_pretrained(tmp_path / "nano", torch_dtype=torch.float16)
    expected = build_nano(torch.float16)
    assert (loaded.config, loaded.untrained) == (NANO, expected.untrained)
    for name in COMPONENTS:
        state = getattr(expected, name).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in getattr(loaded, name).state_dict().items())
