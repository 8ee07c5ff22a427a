# mypy: allow-untyped-defs, allow-incomplete-defs
"""8-bit matrix product for Hopper whose epilogue leaves GELU(y) in 8 bits; a Gluon kernel.

out = gelu(acc * scale_x * scale_w + b) / out_scale, rounded to e4m3; acc = x w^T.

One block of three warpgroups a multiprocessor walks over tiles of 128 x 256 outputs. A producer
warp fills a ring of 4 stages (48 KB each: x [128, 128], w [256, 128]) by tensor copies; two
warpgroups multiply 64 rows each by the same w tile (wgmma 64x256x32, 128 accumulators a thread),
apply the epilogue in registers and hand the tile to the copy engine.

Measured on an H100 at [63700, 1536] x [8960, 1536] with bias, tanh-GELU and 8-bit output: 1.534 ms,
1,143 TFLOP/s; the library's bf16-output product alone takes 1.507 ms. What bounds it: reading
operands from L2. Tiles of 128 x 128 in ping-pong, whose epilogue is hidden behind the other
warpgroup's product, run 1.62 ms with or without the products (8.5 TB/s of operands); 256 x 128 in
one block runs 1.606 ms, 1.277 ms without the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gen3r_kernels.dispatch import FLOAT8, CompileCase
from gen3r_kernels.gluon_names import async_load, async_store

CAPABILITY = (9, 0)
# sqrt(2 / pi), and its product with 0.044715
GELU_LINEAR = gl.constexpr(0.7978845608028654)
GELU_CUBIC = gl.constexpr(0.035677408136300125)


@gluon.jit
def _tile_at(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of a tile: columns of GROUP tiles, so that a wave shares operands in L2."""
    group = index // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    place = index % (GROUP * tiles_n)
    return first + place % height, place // height


@gluon.jit
def _gelu_times(z, half_factor):
    """2 * half_factor * gelu_tanh(z); tanh.approx is off by 5e-4 at most, under 2^-4 of e4m3."""
    u = z * (z * z * GELU_CUBIC + GELU_LINEAR)
    t = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1
    )
    half = z * half_factor
    return half * t + half


@gluon.jit
def _produce(
    x_desc,
    w_desc,
    ring,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Fill the ring's stages, tile after tile, as the consumers empty them."""
    x_ring, w_ring, full, empty, tiles_m, tiles_n, k_tiles = ring
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile_at(index, tiles_m, tiles_n, GROUP)
        for k in range(k_tiles):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (2 * ROWS + COLUMNS) * DEPTH)
            for half in gl.static_range(2):
                row = (m * 2 + half) * ROWS
                async_load(x_desc, [row, k * DEPTH], ready, x_ring.index(stage * 2 + half))
            async_load(w_desc, [n * COLUMNS, k * DEPTH], ready, w_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _finish(
    acc,
    output,
    half,
    row0,
    column0,
    HAS_BIAS: gl.constexpr,
    GELU: gl.constexpr,
):
    """The epilogue of one consumer's tile."""
    out_desc, out_tiles, vectors, rows, channels = output
    x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr = vectors
    LAYOUT: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    out_tile = out_tiles.index(half)
    row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = column0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    x_scale = gl.load(x_scale_ptr + row, mask=row < rows, other=0.0)
    w_scale = gl.load(w_scale_ptr + column, mask=column < channels, other=0.0)
    z = acc * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        bias = gl.load(bias_ptr + column, mask=column < channels, other=0.0)
        z = z + bias.to(gl.float32)[None, :]
    out_scale = gl.load(out_scale_ptr + row, mask=row < rows, other=1.0)
    # A scale of 0 means a row of zeros: any finite factor will do.
    factor = 1.0 / gl.maximum(out_scale, 1e-30)
    y = _gelu_times(z, (factor * 0.5)[:, None]) if GELU else z * factor[:, None]
    y = y.to(out_desc.dtype)
    tma.store_wait(pendings=0)  # the copy engine has read the last tile
    out_tile.store(y)
    fence_async_shared()
    async_store(out_desc, [row0, column0], out_tile)


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    ring,
    output,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GELU: gl.constexpr,
):
    """Multiply and finish the upper (HALF 0) or lower 64 rows of every tile."""
    x_ring, w_ring, full, empty, tiles_m, tiles_n, k_tiles = ring
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    count = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile_at(index, tiles_m, tiles_n, GROUP)
        stage = count % STAGES
        phase = (count // STAGES) & 1
        acc = zero
        # Not `stage`: the front end does not carry a name through the loop that is bound to the
        # same value as another name when the loop begins.
        previous = 0
        for k in range(k_tiles):
            mbarrier.wait(full.index(stage), phase)
            x = x_ring.index(stage * 2 + HALF)
            w = w_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x, w, acc, use_acc=k > 0, is_async=True)
            # One product stays in flight; the stage before it can be filled again.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(previous), count=1, pred=k > 0)
            previous = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(previous), count=1)
        count += k_tiles
        _finish(acc, output, HALF, (m * 2 + HALF) * ROWS, n * COLUMNS, HAS_BIAS, GELU)
    tma.store_wait(pendings=0)


# Not specialised: one compilation serves every number of tokens and every width.
@gluon.jit(do_not_specialize=["rows", "k_tiles"])
def _gemm_kernel(
    x_desc,  # [rows, K] float8, blocks [ROWS, DEPTH]
    w_desc,  # [channels, K] float8, blocks [COLUMNS, DEPTH]
    out_desc,  # [rows, channels] float8, blocks [ROWS, COLUMNS]
    x_scale_ptr,  # [rows] float32
    w_scale_ptr,  # [channels] float32
    bias_ptr,  # [channels], or any pointer without HAS_BIAS
    out_scale_ptr,  # [rows] float32
    rows,
    channels,
    k_tiles,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GELU: gl.constexpr,
):
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, DEPTH], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, COLUMNS, DEPTH], w_desc.layout)
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [2, ROWS, COLUMNS], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    tiles_m = gl.cdiv(rows, 2 * ROWS)
    tiles_n = gl.cdiv(channels, COLUMNS)
    ring = (x_ring, w_ring, full, empty, tiles_m, tiles_n, k_tiles)
    vectors = (x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr)
    output = (out_desc, out_tiles, vectors, rows, channels)
    gl.warp_specialize(
        [
            (_consume, (0, ring, output, ROWS, COLUMNS, STAGES, GROUP, HAS_BIAS, GELU)),
            (_consume, (1, ring, output, ROWS, COLUMNS, STAGES, GROUP, HAS_BIAS, GELU)),
            (_produce, (x_desc, w_desc, ring, ROWS, COLUMNS, DEPTH, STAGES, GROUP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@dataclass(frozen=True)
class GemmConfig:
    """Launch of the kernel. 504 registers for the three warpgroups' threads, as Hopper holds."""

    rows: int = 64  # of a consumer; a block has two
    columns: int = 256
    depth: int = 128
    stages: int = 4
    group: int = 16
    consumer_registers: int = 240
    producer_registers: int = 24

    @classmethod
    def for_shape(cls, rows: int, channels: int, width: int) -> GemmConfig:
        """The one that was measured best at the model's shape serves every shape."""
        return cls()

    def constexprs(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "STAGES": self.stages,
            "GROUP": self.group,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "PRODUCER_REGISTERS": self.producer_registers,
        }


NUM_WARPS = 4  # of the default partition, the first consumer
LAYOUT_8BIT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def gemm_fp8(
    values: Tensor,  # [M, K] float8
    scale: Tensor,  # [M, 1] float32
    weight: Tensor,  # [N, K] float8
    weight_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N]
    gelu: bool,
    out_scale: Tensor,  # [M, 1] float32
) -> Tensor:  # [M, N] float8
    """Launch the kernel.

    Raises
    ------
    ValueError : another GPU than Hopper, or an operand that tensor descriptors cannot describe.
    """
    capability = torch.cuda.get_device_capability(values.device)
    if capability != CAPABILITY:
        raise ValueError(
            f"linear: 8-bit results need compute capability {CAPABILITY}, this GPU has "
            f"{capability}; use out_dtype=torch.bfloat16"
        )
    rows, width = values.shape
    channels = weight.shape[0]
    for name, tensor in (("x", values), ("weight", weight)):
        if tensor.dtype != FLOAT8 or not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"linear: {name} is {tensor.dtype} with strides {tensor.stride()} at address "
                f"{tensor.data_ptr():#x}; it must be contiguous {FLOAT8} on 16 bytes: clone it"
            )
    out = torch.empty(rows, channels, dtype=FLOAT8, device=values.device)
    if rows == 0:
        return out
    config = GemmConfig.for_shape(rows, channels, width)
    blocks = {
        "x": [config.rows, config.depth],
        "w": [config.columns, config.depth],
        "out": [config.rows, config.columns],
    }
    tiles = -(-rows // (2 * config.rows)) * -(-channels // config.columns)
    multiprocessors = torch.cuda.get_device_properties(values.device).multi_processor_count
    _gemm_kernel[(min(tiles, multiprocessors),)](
        TensorDescriptor.from_tensor(values, blocks["x"], LAYOUT_8BIT),
        TensorDescriptor.from_tensor(weight, blocks["w"], LAYOUT_8BIT),
        TensorDescriptor.from_tensor(out, blocks["out"], LAYOUT_8BIT),
        scale,
        weight_scale,
        weight_scale if bias is None else bias,
        out_scale,
        rows,
        channels,
        -(-width // config.depth),
        **config.constexprs(),
        HAS_BIAS=bias is not None,
        GELU=gelu,
        num_warps=NUM_WARPS,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """Every form of the kernel that `gemm_fp8` runs."""
    config = GemmConfig()

    def described(rows: int, columns: int) -> str:
        return f"tensordesc<fp8e4nv[{rows}, {columns}],{LAYOUT_8BIT!r}>"

    pointers = ("x_scale_ptr", "w_scale_ptr", "bias_ptr", "out_scale_ptr")
    signature: dict[str, Any] = {
        "x_desc": described(config.rows, config.depth),
        "w_desc": described(config.columns, config.depth),
        "out_desc": described(config.rows, config.columns),
        **dict.fromkeys(pointers, "*fp32"),
        **dict.fromkeys(("rows", "channels", "k_tiles"), "i32"),
    }
    return [
        CompileCase(
            name=f"gemm_fp8{' bias' if bias else ''}{' gelu' if gelu else ''}",
            kernel=_gemm_kernel,
            signature=signature | ({"bias_ptr": "*bf16"} if bias else {}),
            constexprs=config.constexprs() | {"HAS_BIAS": bias, "GELU": gelu},
            options={"num_warps": NUM_WARPS},
            divisible=(*pointers, "channels"),
            gluon=True,
        )
        for bias, gelu in ((True, True), (True, False), (False, True), (False, False))
    ]
