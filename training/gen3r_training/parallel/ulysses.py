"""Context parallelism: the tokens of one sample spread over several ranks (Ulysses).

Every rank of a context group computes the same sample with 1/n of its tokens. All layers work on
single tokens but self-attention, where an all-to-all gives every rank all tokens of 1/n of the
heads, and a second one takes the result back. Cross-attention's queries stay where they are. The
predictions are gathered, so that every rank of the group has the whole loss.

The gradient of a weight is then n times this rank's share: each of the n equal losses sends its
gradient to the tokens. The mean over all ranks, which sharded data parallelism takes anyway, is the
mean over the samples.

Source: DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from gen3r.transformer import WanTransformer
from gen3r_kernels import Backends, attention


class _Exchange(torch.autograd.Function):
    """All-to-all of rows along the first axis; the derivative is the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sends: list[int], receives: list[int]
    ) -> Tensor:
        ctx.group, ctx.sends, ctx.receives = group, sends, receives
        y = x.new_empty(sum(receives), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), receives, sends, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        dx = dy.new_empty(sum(ctx.sends), *dy.shape[1:])
        dist.all_to_all_single(dx, dy.contiguous(), ctx.sends, ctx.receives, group=ctx.group)
        return dx, None, None, None


def exchange(
    x: Tensor,  # [sum(sends), ...]
    group: dist.ProcessGroup,
    sends: list[int],
    receives: list[int],
) -> Tensor:  # [sum(receives), ...], in the order of the group's ranks
    """Send the first ``sends[0]`` rows to rank 0, the next to rank 1 and so on; differentiable."""
    return _Exchange.apply(x, group, sends, receives)


class Ulysses:
    """Tokens and heads of one context group; the `Spread` and `attend` of a transformer.

    Shares are as equal as they can be: the first ranks have a token more where it does not divide.
    `take` is called with all tokens before anything else and leaves their number in `counts`.
    """

    def __init__(self, group: dist.ProcessGroup, backends: Backends) -> None:
        self.group, self.backends = group, backends
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.counts: list[int] = []  # tokens of each rank

    def take(
        self,
        x: Tensor,  # all tokens along `dim`
        dim: int,
    ) -> Tensor:
        """This rank's tokens.

        Raises
        ------
        ValueError : fewer tokens than ranks.
        """
        tokens = x.shape[dim]
        if tokens < self.ranks:
            raise ValueError(
                f"--context_parallel {self.ranks} is more than the {tokens} tokens of a sample; "
                "use fewer ranks"
            )
        parts = x.tensor_split(self.ranks, dim)
        self.counts = [part.shape[dim] for part in parts]
        return parts[self.rank].contiguous()

    def gather(
        self,
        x: Tensor,  # this rank's tokens along `dim`
        dim: int,
    ) -> Tensor:
        """All tokens on every rank; a token's gradient is the sum over the ranks."""
        rows = x.movedim(dim, 0)
        copies = rows.expand(self.ranks, *rows.shape).flatten(0, 1)
        whole = exchange(copies, self.group, [len(rows)] * self.ranks, self.counts)
        return whole.movedim(0, dim)

    def attend(
        self,
        q: Tensor,  # [B, n, H, D], this rank's tokens
        k: Tensor,  # [B, n, H, D]
        v: Tensor,  # [B, n, H, D]
    ) -> Tensor:  # [B, n, H, D]
        """Attention of this rank's tokens to all tokens."""
        q, k, v = (self.to_heads(x) for x in (q, k, v))
        return self.to_tokens(attention(q, k, v, self.backends))

    def to_heads(
        self,
        x: Tensor,  # [B, n, H, D]
    ) -> Tensor:  # [B, S, H / ranks, D]
        """All heads of this rank's tokens to all tokens of this rank's heads."""
        own = x.shape[1]
        rows = x.unflatten(2, (self.ranks, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        whole = exchange(rows, self.group, [own] * self.ranks, self.counts)
        return whole.transpose(0, 1).contiguous()  # one sample: no copy

    def to_tokens(
        self,
        x: Tensor,  # [B, S, H / ranks, D]
    ) -> Tensor:  # [B, n, H, D]
        """The way back."""
        own = self.counts[self.rank]
        rows = exchange(x.transpose(0, 1), self.group, self.counts, [own] * self.ranks)
        return rows.unflatten(0, (self.ranks, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def check_heads(num_heads: int, ranks: int) -> None:
    """Raise ValueError where `ranks` cannot share the transformer's heads."""
    if num_heads % ranks:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"--context_parallel {ranks} does not divide the transformer's {num_heads} heads; "
            f"use one of {', '.join(map(str, fitting))}"
        )


def spread_tokens(transformer: WanTransformer, group: dist.ProcessGroup) -> None:
    """Let the transformer's forward pass work on a share of the tokens.

    Raises
    ------
    ValueError : heads that the group's ranks do not divide.
    """
    check_heads(transformer.config.num_heads, dist.get_world_size(group))
    ulysses = Ulysses(group, transformer.backends)
    transformer.spread = ulysses
    for block in transformer.typed_blocks:
        block.self_attn.attend = ulysses.attend
