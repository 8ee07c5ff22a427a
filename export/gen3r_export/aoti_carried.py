"""Our operators inside AOTInductor packages: each call becomes its twin, whose kernels are carried.

See `gen3r_kernels.carried` for twins. Attention has more than one kernel that a package could
carry, and the engine's own (Gluon, FlashAttention-3) is none of them. What takes its place is
chosen by name and stands in the manifest's facts:

* ``cudnn``: cuDNN's attention through PyTorch, for fp16 and bf16 and head sizes up to 128;
* ``triton``: the portable kernel of `gen3r_kernels.attention_triton`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.export import ExportedProgram

ATTENTION = ("attention_forward", "attention_forward_fa3")
CHOICES = ("cudnn", "triton")
CUDNN_HEAD_DIM = 128


def options() -> dict[str, Any]:
    """Inductor's settings for packages with kernels of ours.

    Kernels are compiled by a first run through Python: the other way writes C++ into the Python
    code that makes their tensor descriptors (seen in torch 2.13). Their numbers are float32, as
    where Triton launches them itself.
    """
    numbers = "_use_fp64_for_unbacked_floats"
    chosen: dict[str, Any] = {"triton.autotune_at_compile_time": False}
    return chosen | ({numbers: False} if hasattr(inductor, numbers) else {})


def carry(program: ExportedProgram, attention: str = "cudnn") -> dict[str, Any]:
    """Replace every gen3r:: operator of a program by its twin, in place.

    attention : ``cudnn`` or ``triton``; heads that cuDNN does not take go to ``triton``.
    Gives facts for the manifest: calls of each carried operator, and what attention runs on.

    Raises
    ------
    ValueError : an unknown `attention`, or an operator that no package can carry.
    """
    from gen3r_kernels.carried import NAMESPACE, twin

    if attention not in CHOICES:
        raise ValueError(f"attention '{attention}' is unknown; known: {', '.join(CHOICES)}")
    calls: Counter[str] = Counter()
    chosen: set[str] = set()
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            found = getattr(node.target, "namespace", None)
            if node.op != "call_function" or found != "gen3r":
                continue
            name = node.target.name().split("::")[1]
            calls[name] += 1
            if name in ATTENTION:
                taken = _attention(node, attention)
                chosen.add(taken)
                node.target = _cudnn() if taken == "cudnn" else twin(ATTENTION[0])
            else:
                node.target = twin(name)
        module.recompile()
    facts: dict[str, Any] = {}
    if calls:
        facts["carried"] = dict(sorted(calls.items()))
        facts["namespace"] = NAMESPACE
    if chosen:
        facts["attention"] = "+".join(sorted(chosen))
    if "cross_attention" in calls:
        facts["cross_attention"] = "triton"  # the portable kernel; Hopper's is written in Gluon
    return facts


def _attention(node: torch.fx.Node, wanted: str) -> str:
    """What takes the place of one attention call."""
    (q, *_) = node.args
    value = q.meta["val"]  # type: ignore[union-attr]
    half = value.dtype in (torch.float16, torch.bfloat16)
    fits = half and value.shape[-1] <= CUDNN_HEAD_DIM
    return "cudnn" if wanted == "cudnn" and fits else "triton"


def _cudnn() -> Any:
    """The operator that calls cuDNN's attention; registered when it is first needed."""
    if not hasattr(torch.ops.gen3r_export, "attention_cudnn"):
        torch.library.triton_op("gen3r_export::attention_cudnn", attention_cudnn, mutates_args=())
    return torch.ops.gen3r_export.attention_cudnn.default


def attention_cudnn(
    q: torch.Tensor,  # [B, Sq, H, D]
    k: torch.Tensor,  # [B, Sk, H, D]
    v: torch.Tensor,  # [B, Sk, H, D]
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, Sq, H, D]; [B, H, Sq] float32, not filled
    """softmax(q k^T / sqrt(D)) v by cuDNN, with the schema of gen3r::attention_forward.

    The softmax's denominator, which only a backward would read, is not computed.
    """
    heads: list[Tensor] = [x.transpose(1, 2) for x in (q, k, v)]
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, False)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    return found[0].transpose(1, 2), q.new_empty(shape, dtype=torch.float32)


def place_constants(program: ExportedProgram, device: torch.device) -> int:
    """Move a program's constant tensors to `device`, in place; gives how many were elsewhere.

    A constant that the module makes while it runs is traced where it is made, on the host; a
    package would copy it to the GPU at every call, which no CUDA graph can hold.
    """
    moved = 0
    for name, value in program.constants.items():
        if isinstance(value, Tensor) and value.device.type != device.type:
            program.constants[name] = value.to(device)
            moved += 1
    for node in list(program.graph.nodes):
        # Tracing noted where constants were.
        if moved and node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return moved
