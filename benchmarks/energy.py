"""Joules that a GPU has used, from NVML's counter, without a further package.

The counter (``nvmlDeviceGetTotalEnergyConsumption``, millijoules since the driver was loaded, of
the whole board) exists from Volta on. Where the library or the counter is missing, there is no
figure, and `Meter.why_not` says why.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


class NoEnergy(RuntimeError):
    """Energy cannot be read; the text says why."""


class Meter:
    """Reads one GPU's counter; `why_not` is None when it can."""

    def __init__(self, device: torch.device) -> None:
        self.why_not: str | None = None
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        try:
            self._open(device)
            self.joules()
        except NoEnergy as reason:
            self.why_not = str(reason)

    def _open(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise NoEnergy("a CPU has no NVML counter")
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NoEnergy(f"{LIBRARY} cannot be loaded ({error})") from error
        self._call("nvmlInit_v2")
        # By identity: NVML's indices know nothing of CUDA_VISIBLE_DEVICES.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        self._call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(name), ctypes.byref(self._handle))

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise NoEnergy(f"{function} answered with NVML error {code}")

    def joules(self) -> float:
        """J since the driver was loaded.

        Raises
        ------
        NoEnergy : the counter cannot be read.
        """
        if self._library is None:
            raise NoEnergy(self.why_not or "NVML is not open")
        counter = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(counter))
        return counter.value / 1000

    def read(self) -> float | None:
        """J since the driver was loaded once all queued work is done; None where unavailable."""
        if self.why_not is not None:
            return None
        torch.cuda.synchronize()
        return self.joules()
