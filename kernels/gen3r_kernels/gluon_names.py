"""Gluon functions whose names differ between the Triton releases this package runs on."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6: async_copy_global_to_shared; 3.9: async_load
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Triton 3.6: async_copy_shared_to_global; 3.9: async_store
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Triton 3.6: thread_barrier; 3.9: barrier
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
