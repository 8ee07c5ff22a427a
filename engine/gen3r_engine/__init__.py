"""The runtime over gen3r: `Engine`, its `EngineConfig`, and what is asked of it, `SceneRequest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen3r.scene import SceneRequest
    from gen3r_engine.config import EngineConfig
    from gen3r_engine.engine import Engine

__all__ = ["Engine", "EngineConfig", "SceneRequest"]

_HOMES = {
    "Engine": "gen3r_engine.engine",
    "EngineConfig": "gen3r_engine.config",
    "SceneRequest": "gen3r.scene",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: a command's help does not wait for
    torch."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
