"""Text features by content: the same text with the same encoder is encoded once.

The key is the sha256 of the encoder's fingerprint (tokenizer and weights), the dtype, the text
length and the text, so an entry can not belong to anything else. On disk an entry is a safetensors
file with a checksum; one that is damaged counts as missing and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gen3r_engine.caches import write_whole
from gen3r_engine.config import PROMPT_CACHES

KEPT = 128  # entries in memory; one of 512 tokens takes 4 MiB in bf16


def prompt_fingerprint(encoder: str, dtype: torch.dtype, text_len: int) -> str:
    """What features depend on beside the text: encoder's fingerprint, dtype, most tokens."""
    return json.dumps([encoder, str(dtype), text_len])


class PromptCache:
    """Features [n, C] of texts, on the host.

    Parameters
    ----------
    mode : ``memory``, ``disk`` (memory and disk) or ``off``.
    folder : of the entries on disk; made when the first one is written.
    fingerprint : from `prompt_fingerprint`.

    Raises
    ------
    ValueError : an unknown mode, or ``disk`` without a folder.
    """

    def __init__(self, mode: str, folder: Path | None, fingerprint: str) -> None:
        if mode not in PROMPT_CACHES:
            raise ValueError(f"prompt_cache '{mode}' is unknown; known: {', '.join(PROMPT_CACHES)}")
        if mode == "disk" and folder is None:
            raise ValueError("prompt_cache 'disk' needs a folder; give one, or use 'memory'")
        self.mode = mode
        self.folder = folder if mode == "disk" else None
        self.fingerprint = fingerprint
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> Tensor | None:
        """Features [n, C] of the text on the host, None when they are not known."""
        if self.mode == "off":
            return None
        key = self.key(text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = None if self.folder is None else _read(self._path(self.folder, key), key)
        if found is not None:
            self._keep(key, found)
        return found

    def put(
        self,
        text: str,
        features: Tensor,  # [n, C] on any device
    ) -> None:
        """Keep a text's features. A disk that takes no more costs a warning, not the scene."""
        if self.mode == "off":
            return
        if features.ndim != 2:
            raise ValueError(f"features of a text are [n, C], got {list(features.shape)}")
        key = self.key(text)
        # A copy: a row of a batch would keep the whole batch alive.
        value = features.detach().to("cpu", copy=True).contiguous()
        self._keep(key, value)
        if self.folder is None:
            return
        data = save({"features": value}, {"key": key, "checksum": _checksum(value)})
        try:
            write_whole(self._path(self.folder, key), data)
        except OSError as error:
            warnings.warn(
                f"text features can not be kept in {self.folder} ({error}); "
                "they are kept in memory only",
                stacklevel=2,
            )

    def key(self, text: str) -> str:
        """The name of a text's entry."""
        return hashlib.sha256(json.dumps([self.fingerprint, text]).encode()).hexdigest()

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.safetensors"

    def _keep(self, key: str, value: Tensor) -> None:
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _read(path: Path, key: str) -> Tensor | None:
    """An entry from disk; a damaged one is removed and counts as missing."""
    if not path.is_file():
        return None
    value: Tensor | None = None
    with contextlib.suppress(SafetensorError, OSError, ValueError, RuntimeError):
        with safe_open(path, "pt") as file:
            noted = file.metadata() or {}
            value = file.get_tensor("features").clone()
        if noted.get("key") != key or value.ndim != 2 or noted.get("checksum") != _checksum(value):
            value = None
    if value is None:
        with contextlib.suppress(OSError):  # another process may have removed or replaced it
            path.unlink()
    return value
