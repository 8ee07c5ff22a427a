"""Captions as token tables, and which colour word belongs to which noun in them.

A caption of a procedural scene names every part with a colour word of its own before it ("a red
brick room with two white columns"). So the colour of a noun is the last colour word before it,
unless another noun stands between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pairs:
    """Colours and nouns of a batch of captions, position by position; -1 where there is none."""

    color: Tensor  # [B, L] int64 at a noun: the index of its colour
    noun: Tensor  # [B, L] int64 at a colour word: the index of its noun
    partner: Tensor  # [B, L] int64 at a noun: the place of its colour word, and the reverse


@dataclass(frozen=True)
class Words:
    """What a token means, as tables over the whole vocabulary.

    colors, nouns : the words, in the order of their indices.
    """

    colors: tuple[str, ...]
    nouns: tuple[str, ...]
    tokens: Tensor  # [C] int64, the token of each colour
    articles: Tensor  # [C] int64, the token of the article before each colour: "a" or "an"
    color: Tensor  # [V] int64, index of the colour that a token names, else -1
    noun: Tensor  # [V] int64, index of the noun that a token names, else -1

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        colors: Sequence[str],
        nouns: Iterable[str],
        device: torch.device,
    ) -> Words:
        """Tables for these colour words and nouns (of "stone column" the last word counts).

        Raises
        ------
        ValueError : a word that the tokenizer splits.
        """
        heads = sorted({noun.split()[-1] for noun in nouns})
        tables = []
        for group in (list(colors), heads):
            table = torch.full((len(tokenizer),), -1)
            for index, word in enumerate(group):
                table[_token(tokenizer, word)] = index
            tables.append(table.to(device))
        tokens = [_token(tokenizer, word) for word in colors]
        articles = [_token(tokenizer, "an" if word[0] in "aeiou" else "a") for word in colors]
        codes = torch.tensor([tokens, articles], device=device)
        return cls(tuple(colors), tuple(heads), *codes, *tables)

    def pairs(
        self,
        ids: Tensor,  # [B, L] int64
    ) -> Pairs:
        """The colour of each noun and the noun of each colour word."""
        length = ids.shape[1]
        color, noun = self.color[ids], self.noun[ids]
        place = torch.arange(length, device=ids.device).expand_as(ids)
        before = torch.where(color >= 0, place, -1).cummax(1).values
        after = torch.where(noun >= 0, place, length).flip(1).cummin(1).values.flip(1)
        # They belong together where each is the other's nearest.
        at_noun = (noun >= 0) & (before >= 0)
        at_noun &= after.gather(1, before.clamp_min(0)) == place
        at_color = (color >= 0) & (after < length)
        at_color &= before.gather(1, after.clamp_max(length - 1)) == place
        partner = torch.where(at_noun, before, torch.where(at_color, after, -1))
        other = partner.clamp_min(0)
        return Pairs(
            color=torch.where(at_noun, color.gather(1, other), -1),
            noun=torch.where(at_color, noun.gather(1, other), -1),
            partner=partner,
        )

    def recolor(
        self,
        ids: Tensor,  # [B, L] int64
        generator: torch.Generator,
    ) -> Tensor:  # [B, L] int64
        """The captions with one colour word, chosen at random, replaced by another colour.

        Its article follows. A caption without a colour word stays as it is.
        """
        known = self.color[ids]
        chance = torch.rand(ids.shape, generator=generator, device=ids.device)
        at = (chance + (known >= 0)).argmax(1, keepdim=True)
        old, colors = known.gather(1, at), len(self.tokens)
        step = torch.randint(1, colors, old.shape, generator=generator, device=ids.device)
        new = (old + step) % colors
        found = ids.scatter(1, at, torch.where(old >= 0, self.tokens[new], ids.gather(1, at)))
        before = (at - 1).clamp_min(0)
        word = ids.gather(1, before)
        article = (word[..., None] == self.articles).any(-1) & (old >= 0) & (at > 0)
        return found.scatter(
            1, before, torch.where(article, self.articles[new], found.gather(1, before))
        )


def _token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(
            f"the pipeline's tokenizer splits '{word}' into {len(ids)} tokens; training needs "
            "one a word (gen3r.nano_tokenizer.build_tokenizer)"
        )
    return int(ids[0])


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    length: int,
    device: torch.device,
) -> Tensor:  # [N, L] int64, L at most `length`, filled with the padding token
    """All captions with their end tokens, cut at `length` tokens and padded to the longest."""
    return tokenizer(
        list(captions), padding="longest", truncation=True, max_length=length, return_tensors="pt"
    )["input_ids"].to(device)
