"""Every kernel in Triton's interpreter: the tests in tests/kernels/interpreted, in one process.

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
    if not list((REPOSITORY / FOLDER).glob("test_*.py")):
        pytest.fail(f"{FOLDER} holds no tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", FOLDER],
        cwd=REPOSITORY,
        # Interpreted kernels run on the CPU: a GPU would only cost start-up time.
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, f"pytest {FOLDER} under TRITON_INTERPRET=1 failed; output above"
