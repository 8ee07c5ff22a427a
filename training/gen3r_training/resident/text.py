"""Training of a small text encoder together with a small image encoder (`TextObjective`).

The diffusion transformer reads every token's feature by cross-attention, so each must keep its word
and know its neighbours: the feature at "sphere" tells that the sphere is blue. A batch is some
clips with their captions and as many captions alone; the loss is the sum of

- contrast: captions and images of a batch find each other among all others (arXiv 2103.00020), and
  an image its caption among those with one colour word changed (arXiv 2210.01936);
- patches: every patch token tells colour, kind and log depth of the part that it shows;
- binding: the feature at a noun tells its colour, the one at a colour word its noun;
- words: every token's feature tells its own word, also where that was masked (arXiv 1810.04805);
- scale: token features have an RMS of 1.

All of it is asked of the features that the pipeline uses: text after the final norm, image tokens
before the last block. The heads are part of the objective and are not saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from gen3r.config import Gen3RConfig
from gen3r.encoders import CLIP_MEAN, CLIP_STD, preprocess_clip, to_uint8
from gen3r.pipeline import Gen3RPipeline
from gen3r_training.procedural import COLORS, NO_OBJECT, Clips, caption_corpus
from gen3r_training.resident.captions import Words, tokenize
from gen3r_training.resident.text_heads import (
    NONE,
    TextHeads,
    accuracy,
    contrast,
    entropy,
    plain,
    rms,
    start_local,
)

if TYPE_CHECKING:
    from gen3r_training.resident.config import ResidentConfig

CORPUS = 8192  # captions without images; a millisecond each to make
MOST_MASKED = 0.5  # of a caption's words; the share is uniform from 0 to this
RANDOM = 0.2  # of the masked words become a random token, the others <unk>
BRIGHTNESS, TINT = 0.1, 0.03  # colour jitter, small: the names of colours must stay true
WEIGHTS = {"contrast": 1.0, "patches": 0.5, "binding": 1.0, "words": 0.5, "scale": 0.1}


@dataclass(frozen=True)
class TextBatch:
    """Clips with captions, and captions alone. A target is `NONE` where nothing is known."""

    images: Tensor  # [B, 3, S, S] float32, normalised for the image encoder
    captions: Tensor  # [B, L] int64
    recolored: Tensor  # [B, L] int64, one colour word changed
    alone: Tensor  # [B, L] int64, other captions
    masked: Tensor  # [B, L] int64, `alone` with some tokens replaced
    colors: Tensor  # [B, P] int64, of each patch, in rows
    kinds: Tensor  # [B, P] int64
    depths: Tensor  # [B, P] float32, log of scene units; -inf = none


@dataclass(frozen=True)
class _Source:
    """Clips, their tokens [N, L], and of each part (its number in `objects`) colour and kind."""

    clips: Clips
    captions: Tensor  # [N, L] int64
    colors: Tensor  # [N, 256] int64
    kinds: Tensor  # [N, 256] int64


class TextObjective:
    """Text and image encoder of a pipeline, trained on captions and images of clips.

    Parameters
    ----------
    pipeline : its `text_encoder`, `clip_image_encoder` and `tokenizer` are used.
    train, held_out : clips on the pipeline's device. options : its seed is used.
    corpus : how many captions without images to learn from.

    Attributes
    ----------
    module : the two encoders and the heads. components : the two encoders, to be saved.

    Raises
    ------
    ValueError : a tokenizer that splits the captions' words or has more tokens than the encoder.
    """

    def __init__(
        self,
        pipeline: Gen3RPipeline,
        train: Clips,
        held_out: Clips,
        options: ResidentConfig,
        corpus: int = CORPUS,
    ) -> None:
        config, tokenizer, device = pipeline.config, pipeline.tokenizer, train.rgb.device
        if len(tokenizer) > config.text_encoder.vocab:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder "
                f"{config.text_encoder.vocab}; build the pipeline with one vocabulary"
            )
        # Another seed than the clips are usually of, whose captions these would be.
        alone = caption_corpus(corpus, options.seed + 1)
        captions = [*train.captions, *held_out.captions, *alone]
        ids = tokenize(tokenizer, captions, config.transformer.text_len, device)
        parts, evaluated, self._alone = ids.split([len(train), len(held_out), len(alone)])
        self._words = Words.of(tokenizer, list(COLORS), _nouns(train, held_out), device)
        self._kinds = sorted({part.kind for parts in train.parts for part in parts})
        self._train = self._source(train, parts)
        self._held_out = self._source(held_out, evaluated)
        self._sizes = config.clip_image_encoder.image_size, config.clip_image_encoder.patch_size
        scales = torch.tensor((CLIP_MEAN, CLIP_STD), device=device)
        self._mean, self._deviation = scales[..., None, None]
        self._pad, self._end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._mask, self._tokens = tokenizer.unk_token_id, len(tokenizer)
        text = pipeline.text_encoder.requires_grad_(True)
        start_local(text)
        image = pipeline.clip_image_encoder.requires_grad_(True)
        image.encoder.layers[-1].requires_grad_(False)  # `encode_image` does not run these
        image.post_layernorm.requires_grad_(False)
        self.components: dict[str, nn.Module] = {"text_encoder": text, "clip_image_encoder": image}
        self.module = nn.ModuleDict({**self.components, "heads": self._heads(config, options.seed)})

    def draw(self, generator: torch.Generator, count: int) -> TextBatch:
        """`count` clips, each with its caption and another; half of the images are first frames."""
        draw = _Draw(generator, self._alone.device)
        clips = self._train.clips
        number = draw.below(len(clips), count)
        frame = draw.below(clips.rgb.shape[1], count) * (draw.uniform(count) < 0.5)
        images, colors, kinds, depths = self._views(self._train, number, frame)
        mirrored = draw.uniform(count) < 0.5
        images, colors, kinds, depths = (
            torch.where(mirrored.view(-1, *(1,) * (x.ndim - 1)), x.flip(-1), x)
            for x in (images, colors, kinds, depths)
        )
        light = BRIGHTNESS * draw.signed(count, 1, 1, 1) + TINT * draw.signed(count, 3, 1, 1)
        captions = self._train.captions[number]
        alone = self._alone[draw.below(len(self._alone), count)]
        return TextBatch(
            images=self.pixels(images * (1 + light)),
            captions=captions,
            recolored=self._words.recolor(captions, generator),
            alone=alone,
            masked=self._masked(alone, draw),
            colors=colors.flatten(1),
            kinds=kinds.flatten(1),
            depths=depths.flatten(1),
        )

    def loss(self, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the parts, and each of them without its weight."""
        ids = torch.cat((batch.captions, batch.recolored, batch.masked))
        count, heads = len(batch.captions), self._trained_heads
        text, image = self.text_tokens(ids), self.image_tokens(batch.images)
        known = ids[: 2 * count]
        scores = heads.scores(image, text[: 2 * count], (known != self._pad).float())
        losses = {
            "contrast": contrast(scores, batch.captions),
            "patches": heads.patch_loss(image, batch.colors, batch.kinds, batch.depths),
            "binding": heads.binding_loss(text[: 2 * count], self._words.pairs(known)),
            "words": entropy(
                heads.word(plain(text[2 * count :])),
                batch.alone.masked_fill(batch.alone == self._pad, NONE),
            ),
            "scale": (rms(text) - 1).square().mean(),
        }
        total = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Shares of right answers on held-out clips' first frames and captions.

        retrieval, retrieval_5 : the image finds its caption among all, first or in the first five
        (equal captions count as one). recolored : it prefers it to the caption with one colour
        changed. color, noun : binding. masked : masked words. patch_color, patch_kind : patches.
        patch_depth : mean absolute error of log depth. text_rms : of the token features.
        """
        source, heads = self._held_out, self._trained_heads
        ids = source.captions
        draw = _Draw(torch.Generator(ids.device).manual_seed(0), ids.device)
        number = torch.arange(len(ids), device=ids.device)
        images, *targets = self._views(source, number, torch.zeros_like(number))
        image = self.image_tokens(self.pixels(images))
        recolored, masked = self._words.recolor(ids, draw.generator), self._masked(ids, draw)
        text, other, guessed = self.text_tokens(torch.cat((ids, recolored, masked))).chunk(3)
        mask = ids != self._pad
        scores = heads.scores(image, text, mask.float())
        wrong = heads.scores(image, other, mask.float())
        ranks = scores.argsort(1, descending=True)[:, :5]
        found = (ids[ranks] == ids[:, None]).all(-1)
        colors, kinds, depths = (target.flatten(1) for target in targets)
        color, kind, depth = heads.patches(image)
        pairs, seen = self._words.pairs(ids), depths.isfinite()
        hidden = ids.masked_fill(masked == ids, NONE)
        values = {
            "retrieval": found[:, 0].float().mean(),
            "retrieval_5": found.any(1).float().mean(),
            "recolored": (scores.diagonal() > wrong.diagonal()).float().mean(),
            "color": accuracy(heads.color(plain(text)), pairs.color),
            "noun": accuracy(heads.noun(plain(text)), pairs.noun),
            "masked": accuracy(heads.word(plain(guessed)), hidden),
            "patch_color": accuracy(color, colors),
            "patch_kind": accuracy(kind, kinds),
            "patch_depth": (depth - depths)[seen].abs().mean(),
            "text_rms": rms(text)[mask].mean(),
        }
        return {name: float(value) for name, value in values.items()}

    def finish(self) -> None:
        """Nothing is left to do."""

    def _heads(self, config: Gen3RConfig, seed: int) -> TextHeads:
        """New heads, the same for one seed on every device."""
        text, image = config.text_encoder, config.clip_image_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = TextHeads(
                text.dim, image.vision_dim, self._tokens, self._words, len(self._kinds)
            )
        return heads.to(self._alone.device)

    def _source(self, clips: Clips, captions: Tensor) -> _Source:
        """Tables of the parts' colours and kinds; `NO_OBJECT` and unknown ones are `NONE`."""
        colors = {name: index for index, name in enumerate(self._words.colors)}
        kinds = {name: index for index, name in enumerate(self._kinds)}
        table = torch.full((2, len(clips), NO_OBJECT + 1), NONE)
        for row, parts in enumerate(clips.parts):
            table[0, row, : len(parts)] = torch.tensor([colors.get(p.color, NONE) for p in parts])
            table[1, row, : len(parts)] = torch.tensor([kinds.get(p.kind, NONE) for p in parts])
        return _Source(clips, captions, *table.to(captions.device))

    def _views(
        self,
        source: _Source,
        number: Tensor,  # [B] int64, of the clips
        frame: Tensor,  # [B] int64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W] in [0, 1]; per patch [B, G, G]: colour, kind, log depth."""
        size, patch = self._sizes
        clips = source.clips
        height, width = clips.rgb.shape[2:4]
        centre = (torch.arange(size // patch, device=number.device) + 0.5) / (size // patch)
        rows, columns = (centre * height).long()[:, None], (centre * width).long()[None]
        place = (number[:, None, None], frame[:, None, None], rows, columns)
        part = clips.objects[place].flatten(1).long()
        shape = (len(number), *centre.shape, *centre.shape)
        colors, kinds = (
            table[number].gather(1, part).view(shape) for table in (source.colors, source.kinds)
        )
        images = clips.rgb[number, frame].movedim(-1, 1).float() / 255
        return images, colors, kinds, clips.depth[place].float().log()

    def pixels(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] as the image encoder takes them (`preprocess_clip`)."""
        size = self._sizes[0]
        if images.shape[-2:] != (size, size):
            return preprocess_clip(to_uint8(images), size)
        # The resize would change nothing, and it is a quarter of a step on a CPU.
        return (to_uint8(images).float() / 255 - self._mean) / self._deviation

    def _masked(self, ids: Tensor, draw: _Draw) -> Tensor:
        """Some words (never the end token) become <unk> or a random token."""
        share = MOST_MASKED * draw.uniform(len(ids), 1)
        chosen = (draw.uniform(*ids.shape) < share) & (ids != self._pad) & (ids != self._end)
        random = draw.below(self._tokens, *ids.shape)
        new = torch.where(draw.uniform(*ids.shape) < RANDOM, random, self._mask)
        return torch.where(chosen, new, ids)

    def text_tokens(self, ids: Tensor) -> Tensor:
        """[B, L, C] features after the final norm, as `encode_text`."""
        # A mask of four dimensions is taken as it is; of one of two, transformers asks for its
        # values, which would wait for the device in every step.
        mask = (ids != self._pad)[:, None, None].expand(-1, 1, ids.shape[1], -1)
        return self.module["text_encoder"](input_ids=ids, attention_mask=mask).last_hidden_state

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """[B, 1 + P, C] tokens before the last block, as `encode_image`."""
        model = cast(CLIPVisionModel, self.module["clip_image_encoder"])
        x = model.pre_layrnorm(model.embeddings(pixels))
        for block in list(model.encoder.layers)[:-1]:
            x = block(x, attention_mask=None)
        return x

    @property
    def _trained_heads(self) -> TextHeads:
        return cast(TextHeads, self.module["heads"])


@dataclass(frozen=True)
class _Draw:
    """Random numbers of one generator on its device."""

    generator: torch.Generator
    device: torch.device

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def signed(self, *shape: int) -> Tensor:
        """Uniform in [-1, 1)."""
        return 2 * self.uniform(*shape) - 1


def _nouns(*sets: Clips) -> set[str]:
    return {part.name for clips in sets for parts in clips.parts for part in parts}
