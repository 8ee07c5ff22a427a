"""Operators of the Gen3R model: one file per operator, one public function per operator.

Every operator has a float32 reference in plain PyTorch (``<op>_reference``) that tests and
benchmarks import, and a public function of the same name that the model calls. The public function
picks the implementation from the tensors' device and dtype and from the ``Backends`` value that the
model was built with: kernels for CUDA tensors in reduced precision, the reference elsewhere.
"""

from gen3r_kernels.adamw_step import (
    AdamWPlan,
    AdamWStep,
    Moments,
    adamw_step,
    adamw_step_reference,
)
from gen3r_kernels.attention import attention, attention_reference
from gen3r_kernels.attention_8bit import (
    attention_8bit_reference,
    attention_quantized,
    attention_quantized_reference,
    quantize_attention,
)
from gen3r_kernels.backends import ATTENTION_BACKENDS, AttentionBackend, Backends
from gen3r_kernels.bias_gelu import bias_gelu, bias_gelu_reference
from gen3r_kernels.causal_conv3d import causal_conv3d, causal_conv3d_reference
from gen3r_kernels.conv2d_add_relu import conv2d_add_relu, conv2d_add_relu_reference
from gen3r_kernels.cross_attention import cross_attention, cross_attention_reference
from gen3r_kernels.dense_output import dense_output, dense_output_reference
from gen3r_kernels.gated_residual import gated_residual, gated_residual_reference
from gen3r_kernels.guidance_step import (
    EulerStep,
    MultistepStep,
    guidance_step,
    guidance_step_reference,
)
from gen3r_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_reference
from gen3r_kernels.layer_norm_rope import layer_norm_rope, layer_norm_rope_reference
from gen3r_kernels.linear import linear, linear_reference
from gen3r_kernels.linear_fp8 import linear_fp8_reference
from gen3r_kernels.linears import linears, linears_reference
from gen3r_kernels.neighbor_distance import neighbor_distance, neighbor_distance_reference
from gen3r_kernels.neighbor_index import NeighborIndex, build_index
from gen3r_kernels.quantize import (
    QuantizedWeight,
    dequantize,
    quantize,
    quantize_reference,
    quantize_weight,
)
from gen3r_kernels.quantized import Quantized
from gen3r_kernels.resize_bilinear import (
    add_position,
    resize_bilinear,
    resize_bilinear_reference,
)
from gen3r_kernels.rms_norm_rope import (
    rms_norm,
    rms_norm_reference,
    rms_norm_rope,
    rms_norm_rope_reference,
)
from gen3r_kernels.rms_norm_rope_int8 import (
    rms_norm_rope_int8,
    rms_norm_rope_int8_reference,
    rope_key_mean,
)
from gen3r_kernels.rms_norm_silu import rms_norm_silu, rms_norm_silu_reference
from gen3r_kernels.unproject import unproject, unproject_reference
from gen3r_kernels.upsample_conv2d import upsample_conv2d, upsample_conv2d_reference
from gen3r_kernels.voxel_average import voxel_average, voxel_average_reference

__all__ = [
    "ATTENTION_BACKENDS",
    "AdamWPlan",
    "AdamWStep",
    "AttentionBackend",
    "Backends",
    "EulerStep",
    "Moments",
    "MultistepStep",
    "NeighborIndex",
    "Quantized",
    "QuantizedWeight",
    "adamw_step",
    "adamw_step_reference",
    "add_position",
    "attention",
    "attention_8bit_reference",
    "attention_quantized",
    "attention_quantized_reference",
    "attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "build_index",
    "causal_conv3d",
    "causal_conv3d_reference",
    "conv2d_add_relu",
    "conv2d_add_relu_reference",
    "cross_attention",
    "cross_attention_reference",
    "dense_output",
    "dense_output_reference",
    "dequantize",
    "gated_residual",
    "gated_residual_reference",
    "guidance_step",
    "guidance_step_reference",
    "layer_norm_modulate",
    "layer_norm_modulate_reference",
    "layer_norm_rope",
    "layer_norm_rope_reference",
    "linear",
    "linear_fp8_reference",
    "linear_reference",
    "linears",
    "linears_reference",
    "neighbor_distance",
    "neighbor_distance_reference",
    "quantize",
    "quantize_attention",
    "quantize_reference",
    "quantize_weight",
    "resize_bilinear",
    "resize_bilinear_reference",
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_rope",
    "rms_norm_rope_int8",
    "rms_norm_rope_int8_reference",
    "rms_norm_rope_reference",
    "rms_norm_silu",
    "rms_norm_silu_reference",
    "rope_key_mean",
    "unproject",
    "unproject_reference",
    "upsample_conv2d",
    "upsample_conv2d_reference",
    "voxel_average",
    "voxel_average_reference",
]
