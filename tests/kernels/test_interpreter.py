"""Every kernel in Triton's interpreter: tests/kernels/interpreted, in processes of its own.

By hand: TRITON_INTERPRET=1 python -m pytest -q tests/kernels/interpreted
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "tests/kernels/interpreted"


@pytest.mark.slow
def test_interpreted_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is interpreted already: run the folder itself")
    files = sorted(str(p) for p in (REPOSITORY / FOLDER).glob("test_*.py"))
    if not files:
        pytest.fail(f"{FOLDER} holds no tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    # Interpreted kernels run on the CPU, on one thread: a GPU would only cost start-up time.
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    environment = inherited | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    halves = [
        subprocess.Popen(
            [*command, *half],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in (files[::2], files[1::2])
        if half
    ]
    outputs = [half.communicate()[0] for half in halves]
    print(*outputs, sep="\n")
    failed = any(half.returncode != 0 for half in halves)
    assert not failed, f"pytest {FOLDER} under TRITON_INTERPRET=1 failed; output above"
