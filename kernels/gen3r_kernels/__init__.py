"""Operators of the Gen3R model: one file per operator, one public function per operator.

Every operator has a float32 reference in plain PyTorch (``<op>_reference``) that tests and
benchmarks import, and a public function of the same name that the model calls. The public function
picks the implementation from the tensors' device and dtype and from the ``Backends`` value that the
model was built with; today the reference serves every device and dtype.
"""

from gen3r_kernels.attention import attention, attention_reference
from gen3r_kernels.backends import ATTENTION_BACKENDS, AttentionBackend, Backends
from gen3r_kernels.conv3d import conv3d, conv3d_reference
from gen3r_kernels.cross_attention import cross_attention, cross_attention_reference
from gen3r_kernels.gated_residual import gated_residual, gated_residual_reference
from gen3r_kernels.guidance_step import (
    EulerStep,
    MultistepStep,
    guidance_step,
    guidance_step_reference,
)
from gen3r_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_reference
from gen3r_kernels.rms_norm_rope import (
    rms_norm,
    rms_norm_reference,
    rms_norm_rope,
    rms_norm_rope_reference,
)
from gen3r_kernels.rms_norm_silu import rms_norm_silu, rms_norm_silu_reference
from gen3r_kernels.unproject import unproject, unproject_reference

__all__ = [
    "ATTENTION_BACKENDS",
    "AttentionBackend",
    "Backends",
    "EulerStep",
    "MultistepStep",
    "attention",
    "attention_reference",
    "conv3d",
    "conv3d_reference",
    "cross_attention",
    "cross_attention_reference",
    "gated_residual",
    "gated_residual_reference",
    "guidance_step",
    "guidance_step_reference",
    "layer_norm_modulate",
    "layer_norm_modulate_reference",
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_rope",
    "rms_norm_rope_reference",
    "rms_norm_silu",
    "rms_norm_silu_reference",
    "unproject",
    "unproject_reference",
]
