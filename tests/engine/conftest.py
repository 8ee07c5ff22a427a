"""Fixtures of the command-line tests."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen3r.writers import save_video
from tests.engine.scenes import MadePipeline


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> MadePipeline:
    """The pipeline that the command line finds in place of the embedded model."""
    made = MadePipeline()

    def build_nano(**settings: Any) -> MadePipeline:
        made.built_with = settings
        return made

    module = types.SimpleNamespace(build_nano=build_nano, NANO=made.config)
    monkeypatch.setitem(sys.modules, "gen3r.nano", module)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a photo, a second one of another size, and a video."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", (60, 80)), ("b.png", (90, 70))):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(name)
    save_video(np.zeros((7, 16, 16, 3), np.uint8), "v.mp4")
    return tmp_path
