"""What training asks of text and image features: linear heads, their losses, a start for attention.

Targets are class indices; `NONE` counts for nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from gen3r_training.resident.captions import Pairs, Words

NONE = -1
SHARPEST = math.log(100.0)  # CLIP's limit of the contrast's scale
UNTRAINED = 1.0  # position biases below this were never trained (they begin with 1 / sqrt(width))
WRONG_WAY = 3.0  # by so much an untrained head's bias is lower in the other direction


class TextHeads(nn.Module):
    """What is asked of the features; used in training alone."""

    def __init__(self, text: int, image: int, vocabulary: int, words: Words, kinds: int) -> None:
        super().__init__()
        width, colors = min(text, image), len(words.tokens)
        self.text = nn.Linear(text, width, bias=False)
        self.image = nn.Linear(image, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
        self.color, self.noun = nn.Linear(text, colors), nn.Linear(text, len(words.nouns))
        self.word = nn.Linear(text, vocabulary)
        self.patch = nn.Linear(image, colors + kinds + 1)
        self.split = (colors, kinds, 1)

    def scores(
        self,
        image: Tensor,  # [B, 1 + P, C] image tokens
        text: Tensor,  # [B', L, C] token features
        mask: Tensor,  # [B', L] 1 for tokens
    ) -> Tensor:  # [B, B'] float32
        """How well every image goes with every caption: class token against the tokens' mean."""
        weight = (mask / mask.sum(1, keepdim=True))[..., None].to(text.dtype)
        a = F.normalize(self.image(plain(image[:, 0])), dim=-1)
        b = F.normalize(self.text((plain(text) * weight).sum(1)), dim=-1)
        return self.scale.float().clamp_max(SHARPEST).exp() * (a @ b.T).float()

    def patches(
        self,
        image: Tensor,  # [B, 1 + P, C] image tokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every patch: colours [B, P, colours], kinds [B, P, kinds], log depth [B, P]."""
        color, kind, depth = self.patch(plain(image[:, 1:])).split(self.split, -1)
        return color, kind, depth[..., 0].float()

    def patch_loss(
        self,
        image: Tensor,  # [B, 1 + P, C]
        colors: Tensor,  # [B, P] int64
        kinds: Tensor,  # [B, P] int64
        depths: Tensor,  # [B, P] float32, log; not finite where there is none
    ) -> Tensor:  # []
        """Cross-entropy of colours and kinds and the mean absolute error of log depth."""
        color, kind, depth = self.patches(image)
        seen = depths.isfinite()
        error = (depth - depths.masked_fill(~seen, 0.0)).abs() * seen
        return entropy(color, colors) + entropy(kind, kinds) + error.sum() / seen.sum().clamp_min(1)

    def binding_loss(
        self,
        text: Tensor,  # [B, L, C]
        pairs: Pairs,
    ) -> Tensor:  # []
        """Cross-entropy of the colour at each noun and of the noun at each colour word."""
        features = plain(text)
        return entropy(self.color(features), pairs.color) + entropy(self.noun(features), pairs.noun)


def plain(x: Tensor) -> Tensor:
    """Features at one scale, so that heads neither use nor change it."""
    return F.layer_norm(x, x.shape[-1:])


def rms(
    x: Tensor,  # [..., C]
) -> Tensor:  # [...] float32
    return x.float().square().mean(-1).sqrt()


def entropy(
    logits: Tensor,  # [..., K]
    targets: Tensor,  # [...] int64
) -> Tensor:  # [] mean over the targets that count, 0 without any
    total = F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=NONE, reduction="sum"
    )
    return total / (targets != NONE).sum().clamp_min(1)


def contrast(
    scores: Tensor,  # [B, 2 B]: the images' own captions, then the recoloured ones
    captions: Tensor,  # [B, L] int64
) -> Tensor:  # []
    """Both directions' cross-entropy. Equal captions are no negatives of each other."""
    count = len(captions)
    same = (captions[:, None] == captions[None]).all(-1).fill_diagonal_(False)
    own = scores[:, :count].float().masked_fill(same, -torch.inf)
    target = torch.arange(count, device=scores.device)
    rows = F.cross_entropy(torch.cat((own, scores[:, count:].float()), 1), target)
    return (rows + F.cross_entropy(own.T, target)) / 2


def accuracy(
    logits: Tensor,  # [..., K]
    targets: Tensor,  # [...] int64
) -> Tensor:  # [] share of right ones among the targets that count
    counts = targets != NONE
    return ((logits.argmax(-1) == targets) & counts).sum() / counts.sum()


@torch.no_grad()
def start_local(encoder: UMT5EncoderModel) -> None:
    """Let the heads of an untrained encoder look at near words, by turns before and after.

    The bias falls by the distance times 1, 1/2, 1/4, ... (linear biases: arXiv 2108.12409); they
    are trained from there. From almost no bias a noun takes four times as many steps to find its
    colour. A trained encoder is left as it is.
    """
    for block in encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
        if bias.abs().max() >= UNTRAINED:
            continue
        half = len(bias) // 2  # first the buckets of words before, then of those after
        # From the eighth on a bucket is more than one word wide; that far away it does not matter.
        distance = torch.arange(half, dtype=bias.dtype, device=bias.device)
        for head in range(bias.shape[1]):
            fall = -distance / 2 ** (head // 2)
            before, after = (0.0, WRONG_WAY) if head % 2 == 0 else (WRONG_WAY, 0.0)
            bias[:half, head] += fall - before
            bias[half:, head] += fall - after
