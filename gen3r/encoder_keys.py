"""Parameter names of the two encoders: upstream's on disk, transformers' in memory.

The published folder stores UMT5 and CLIP under upstream's own names; the modules come from
transformers. The tables below are the whole difference: `#` stands for the block number; several
names on the right are one upstream tensor split evenly along axis 0 (fused query, key, value).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rule:
    """One upstream tensor and the transformers tensors that hold it.

    Parameters
    ----------
    upstream : its name in the checkpoint.
    ours : names in the transformers module; several share it in equal parts along axis 0.
    leading : axes of size one that upstream has in front of our shape.
    """

    upstream: str
    ours: tuple[str, ...]
    leading: int = 0


@dataclass(frozen=True)
class KeyMap:
    """A table of rules, applied in both directions.

    Parameters
    ----------
    rules : see `Rule`.
    unused : beginnings of upstream names that Gen3R has no use for; neither loaded nor saved.
    tied : our names that are a second name of another of our tensors.
    """

    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    def is_unused(self, upstream: str) -> bool:
        """Whether an upstream name belongs to a part that is not loaded."""
        return upstream.startswith(self.unused)

    def our_names(self, upstream: str) -> tuple[str, ...]:
        """Our names for an upstream name, () when it is unused or unknown."""
        pattern, block = _split_block(upstream)
        rule = next((r for r in self.rules if r.upstream == pattern), None)
        return () if rule is None else tuple(o.replace("#", block) for o in rule.ours)

    def from_upstream(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Our tensors of one upstream tensor, as views of it; [] for a name that is not loaded.

        Tied names are not repeated here: `finish` ties them once everything is in place.

        Raises
        ------
        ValueError : a name neither in the table nor unused, or a shape that can not be split.
        """
        pattern, block = _split_block(name)
        rule = next((r for r in self.rules if r.upstream == pattern), None)
        if rule is None:
            if self.is_unused(name):
                return []
            raise ValueError(f"unexpected tensor '{name}'; the checkpoint is of another model")
        parts = len(rule.ours)
        shape = tuple(tensor.shape)
        if any(s != 1 for s in shape[: rule.leading]) or len(shape) <= rule.leading:
            raise ValueError(
                f"'{name}' has shape {shape}, expected {rule.leading} leading axes of 1"
            )
        tensor = tensor.reshape(shape[rule.leading :])
        if tensor.shape[0] % parts:
            raise ValueError(f"'{name}' has shape {shape}, its first axis must split in {parts}")
        ours = (o.replace("#", block) for o in rule.ours)
        return list(zip(ours, tensor.chunk(parts), strict=True))

    def state_from_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the transformers module, with tied names. Raises as `from_upstream`."""
        result = {
            ours: t
            for name, tensor in state.items()
            for ours, t in self.from_upstream(name, tensor)
        }
        return result | {
            name: result[source] for name, source in self.tied.items() if source in result
        }

    def state_to_upstream(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors of a module's state dict, in upstream's names and shapes.

        Raises
        ------
        ValueError : a name outside the table, or a fused tensor of which a part is missing.
        """
        result = {}
        for name in state:
            if name in self.tied:
                continue
            pattern, block = _split_block(name)
            rule = next((r for r in self.rules if pattern in r.ours), None)
            if rule is None:
                raise ValueError(f"'{name}' has no upstream name")
            names = [o.replace("#", block) for o in rule.ours]
            if missing := [n for n in names if n not in state]:
                raise ValueError(
                    f"'{name}' is there but {missing} of the same upstream tensor is not"
                )
            if pattern != rule.ours[0]:
                continue  # joined when its first part comes by
            joined = state[name] if len(names) == 1 else torch.cat([state[n] for n in names])
            shape = (*(1 for _ in range(rule.leading)), *joined.shape)
            result[rule.upstream.replace("#", block)] = joined.reshape(shape)
        return result

    def expected(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Upstream names and shapes of a module, which may be on the meta device."""
        meta = {name: torch.empty_like(t, device="meta") for name, t in module.state_dict().items()}
        return {name: tuple(t.shape) for name, t in self.state_to_upstream(meta).items()}


def _split_block(name: str) -> tuple[str, str]:
    """("a.#.b", "7") for "a.7.b"; names without a block number come back unchanged."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}.#.{name[found.end() :]}", found.group(1)


_T5 = "encoder.block.#.layer"
TEXT_KEY_MAP = KeyMap(
    rules=(
        Rule("token_embedding.weight", ("shared.weight",)),
        Rule("blocks.#.norm1.weight", (f"{_T5}.0.layer_norm.weight",)),
        Rule("blocks.#.attn.q.weight", (f"{_T5}.0.SelfAttention.q.weight",)),
        Rule("blocks.#.attn.k.weight", (f"{_T5}.0.SelfAttention.k.weight",)),
        Rule("blocks.#.attn.v.weight", (f"{_T5}.0.SelfAttention.v.weight",)),
        Rule("blocks.#.attn.o.weight", (f"{_T5}.0.SelfAttention.o.weight",)),
        Rule(
            "blocks.#.pos_embedding.embedding.weight",
            (f"{_T5}.0.SelfAttention.relative_attention_bias.weight",),
        ),
        Rule("blocks.#.norm2.weight", (f"{_T5}.1.layer_norm.weight",)),
        Rule("blocks.#.ffn.gate.0.weight", (f"{_T5}.1.DenseReluDense.wi_0.weight",)),
        Rule("blocks.#.ffn.fc1.weight", (f"{_T5}.1.DenseReluDense.wi_1.weight",)),
        Rule("blocks.#.ffn.fc2.weight", (f"{_T5}.1.DenseReluDense.wo.weight",)),
        Rule("norm.weight", ("encoder.final_layer_norm.weight",)),
    ),
    tied={"encoder.embed_tokens.weight": "shared.weight"},
)

_CLIP = "encoder.layers.#"


def _affine(upstream: str, *ours: str) -> tuple[Rule, Rule]:
    weight, bias = (
        Rule(f"{upstream}.{p}", tuple(f"{o}.{p}" for o in ours)) for p in ("weight", "bias")
    )
    return weight, bias


IMAGE_KEY_MAP = KeyMap(
    rules=(
        Rule("model.visual.cls_embedding", ("embeddings.class_embedding",), leading=2),
        Rule("model.visual.pos_embedding", ("embeddings.position_embedding.weight",), leading=1),
        Rule("model.visual.patch_embedding.weight", ("embeddings.patch_embedding.weight",)),
        *_affine("model.visual.pre_norm", "pre_layrnorm"),
        *_affine("model.visual.transformer.#.norm1", f"{_CLIP}.layer_norm1"),
        *_affine(
            "model.visual.transformer.#.attn.to_qkv",
            f"{_CLIP}.self_attn.q_proj",
            f"{_CLIP}.self_attn.k_proj",
            f"{_CLIP}.self_attn.v_proj",
        ),
        *_affine("model.visual.transformer.#.attn.proj", f"{_CLIP}.self_attn.out_proj"),
        *_affine("model.visual.transformer.#.norm2", f"{_CLIP}.layer_norm2"),
        *_affine("model.visual.transformer.#.mlp.0", f"{_CLIP}.mlp.fc1"),
        *_affine("model.visual.transformer.#.mlp.2", f"{_CLIP}.mlp.fc2"),
        *_affine("model.visual.post_norm", "post_layernorm"),
    ),
    unused=("model.textual.", "model.log_scale", "model.visual.head"),
)
