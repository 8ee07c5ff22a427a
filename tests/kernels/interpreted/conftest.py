"""These tests run the kernels in Triton's interpreter, in a process of their own.

Triton decides at import whether kernels are interpreted, so the ordinary run leaves the folder out
and tests/kernels/test_interpreter.py starts it with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
