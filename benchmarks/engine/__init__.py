"""Suites of the runtime: the denoising step, whole scenes, memory, start-up, fidelity."""
