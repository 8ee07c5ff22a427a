"""What both stages are trained on in tests: one synthetic scene and a small pipeline, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen3r.nano import build_untrained
from tests.training.scenes import write_data_root

FRAMES, SIZE = 5, 56


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One scene of exactly one clip, in train/ and in val/."""
    return write_data_root(tmp_path_factory.mktemp("data"), frames=FRAMES, size=SIZE)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with autoencoders like trained ones.

    Their posteriors are narrow and their latents differ from place to place; those of the untrained
    ones are mostly noise, of which nothing can be learned.
    """
    pipeline = build_untrained()
    with torch.no_grad():
        for autoencoder in (pipeline.wan_vae, pipeline.geo_adapter):
            last, channels = autoencoder.model.conv1, autoencoder.latent_channels
            last.weight[:channels] *= 12
            last.weight[channels:] = 0
            last.bias[channels:] = -12
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder
