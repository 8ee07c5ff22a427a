"""Fixtures of the command-line tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen3r.writers import save_video
from gen3r_engine import EngineConfig
from gen3r_engine.engine import Engine
from tests.engine.scenes import MadeEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> MadeEngine:
    """The engine found in place of the embedded model's, which says it makes the real sizes."""
    made, original = MadeEngine(), Engine.load

    def load(checkpoint: str | Path | None, config: EngineConfig) -> MadeEngine | Engine:
        if checkpoint is not None:
            return original(checkpoint, config)
        made.config = config
        return made

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr("gen3r.nano.NANO", made.pipeline.config)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a photo, a second one of another size, and a video."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", (60, 80)), ("b.png", (90, 70))):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(name)
    save_video(np.zeros((7, 16, 16, 3), np.uint8), "v.mp4")
    return tmp_path
