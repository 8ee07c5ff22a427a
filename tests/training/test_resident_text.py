"""Training of text and image encoder on clips in memory: labels, losses, learning, evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gen3r.config import GEN3R, ImageEncoderConfig, TextEncoderConfig
from gen3r.encoders import (
    build_image_encoder,
    build_text_encoder,
    encode_image,
    encode_text,
    preprocess_clip,
)
from gen3r.nano_tokenizer import VOCABULARY, build_tokenizer
from gen3r.pipeline import Gen3RPipeline
from gen3r_training.procedural import COLORS, NO_OBJECT, Clips, Part, caption_corpus
from gen3r_training.resident.captions import Words, tokenize
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.text import TextObjective
from gen3r_training.resident.text_heads import start_local

SIZE, FRAMES, NOUNS = 28, 2, ("sphere", "box")
TOKENIZER = build_tokenizer()
CPU = torch.device("cpu")
TEXT = "a red brick room with an orange floor, two white columns and a blue sphere"


def pipeline(seed: int = 0) -> Gen3RPipeline:
    """What the objective takes of a pipeline, at a tenth of the embedded model's size."""
    config = replace(
        GEN3R,
        transformer=replace(GEN3R.transformer, text_len=10, text_dim=32, clip_dim=32),
        text_encoder=TextEncoderConfig(
            vocab=VOCABULARY, dim=32, dim_attn=32, dim_ffn=32, num_heads=2, num_layers=2
        ),
        clip_image_encoder=ImageEncoderConfig(
            image_size=SIZE, vision_dim=32, vision_heads=2, vision_layers=3
        ),
    )
    torch.manual_seed(seed)
    made = SimpleNamespace(
        config=config,
        tokenizer=TOKENIZER,
        text_encoder=build_text_encoder(config.text_encoder),
        clip_image_encoder=build_image_encoder(config.clip_image_encoder),
    )
    return cast(Gen3RPipeline, made)


def clips(count: int, seed: int) -> Clips:
    """A sphere and a box, left and right or the reverse, each an even colour."""
    chance = torch.Generator().manual_seed(seed)
    names = list(COLORS)
    palette = (torch.tensor(list(COLORS.values())) * 255).to(torch.uint8)
    chosen = torch.randint(len(names), (count, 2), generator=chance)
    left = torch.randint(2, (count, 1), generator=chance)
    objects = left.new_zeros(count, FRAMES, SIZE, SIZE, dtype=torch.uint8)
    objects[..., SIZE // 2 :] = 1
    objects ^= left.to(torch.uint8)[:, :, None, None]
    colors = palette[chosen]  # [N, 2, 3]
    rgb = colors[torch.arange(count)[:, None, None, None], objects.long()]
    eye = torch.eye(4)
    return Clips(
        rgb=rgb,
        depth=(1 + objects).half(),
        objects=objects,
        c2w=eye.repeat(count, FRAMES, 1, 1),
        intrinsics=eye[:3, :3].repeat(count, 1, 1),
        captions=tuple(f"a {names[a]} sphere and a {names[b]} box" for a, b in chosen.tolist()),
        parts=tuple(
            tuple(Part(n, names[i], n) for n, i in zip(NOUNS, row, strict=True))
            for row in chosen.tolist()
        ),
        moves=("free",) * count,
    )


def options(**changes: Any) -> ResidentConfig:
    values: dict[str, Any] = {"stage": "text", "data": "clips", "output": "out", "seed": 3}
    return ResidentConfig(**(values | changes))


@pytest.fixture(scope="module")
def objective() -> TextObjective:
    return TextObjective(pipeline(), clips(64, 1), clips(12, 2), options(), corpus=256)


def words() -> Words:
    return Words.of(TOKENIZER, list(COLORS), ["room", "floor", "columns", "brick sphere"], CPU)


def pieces(ids: Tensor) -> list[str]:
    return [text.removeprefix("Ġ") for text in TOKENIZER.convert_ids_to_tokens(ids.tolist())]


def test_each_noun_is_bound_to_its_own_colour() -> None:
    ids = tokenize(TOKENIZER, [TEXT, "a room and a red hall with a sphere, a blue room"], 64, CPU)
    table, names = words(), list(COLORS)
    pairs = table.pairs(ids)
    found = [
        [(pieces(row)[i], names[int(colors[i])]) for i in (colors >= 0).nonzero()[:, 0]]
        for row, colors in zip(ids, pairs.color, strict=True)
    ]
    first = [("room", "red"), ("floor", "orange"), ("columns", "white"), ("sphere", "blue")]
    # "hall" is no known noun here: what stands between a colour and the next noun is passed over.
    assert found == [first, [("sphere", "red"), ("room", "blue")]]
    told = [table.nouns[int(i)] for i in pairs.noun[0] if i >= 0]
    assert told == ["room", "floor", "columns", "sphere"]
    at = (pairs.partner[0] >= 0).nonzero()[:, 0]
    assert (pairs.partner[0][pairs.partner[0][at]] == at).all()


def test_recolouring_changes_one_colour_and_its_article() -> None:
    ids = tokenize(TOKENIZER, [TEXT, "an empty room"], 64, CPU).repeat(200, 1)
    new = words().recolor(ids, torch.Generator().manual_seed(0))
    assert torch.equal(new[1::2], ids[1::2])  # without a colour word
    changed = set()
    for row in new[::2]:
        was, now = pieces(ids[0]), pieces(row)
        pairs = [(a, b) for a, b in zip(was, now, strict=True) if a != b]
        (color,) = [(a, b) for a, b in pairs if a in COLORS]
        assert color[1] in COLORS
        others = [p for p in pairs if p != color]
        assert others in ([], [("a", "an")], [("an", "a")])
        if color[0] == "orange":
            assert others == [("an", "a")]
        changed.add(color[0])
    assert changed == {"red", "orange", "white", "blue"}


def test_a_split_word_and_too_small_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="splits 'turquoisest' into 12 tokens"):
        Words.of(TOKENIZER, ["turquoisest"], [], CPU)
    small = pipeline()
    small.config = replace(small.config, text_encoder=replace(small.config.text_encoder, vocab=99))
    with pytest.raises(ValueError, match="text encoder 99"):
        TextObjective(small, clips(2, 1), clips(2, 2), options(), corpus=4)


def test_features_are_those_of_the_pipeline(objective: TextObjective) -> None:
    encoders = objective.components
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    pixels = preprocess_clip(images, SIZE)
    expected = encode_image(cast(Any, encoders["clip_image_encoder"]), pixels)
    torch.testing.assert_close(objective.image_tokens(pixels), expected)
    torch.testing.assert_close(objective.pixels(images.float() / 255 + 1e-4), pixels)
    wide = objective.pixels(images.repeat(1, 1, 2, 2).float() / 255 + 1e-4)
    torch.testing.assert_close(wide, preprocess_clip(images.repeat(1, 1, 2, 2), SIZE))
    ids = tokenize(TOKENIZER, ["a red box", TEXT], 64, CPU)
    mask = (ids != TOKENIZER.pad_token_id).long()
    features = encode_text(cast(Any, encoders["text_encoder"]), ids, mask)
    found = objective.text_tokens(ids)
    torch.testing.assert_close(found[mask.bool()], features[mask.bool()])


def test_an_untrained_encoder_starts_with_near_words() -> None:
    encoder = pipeline().text_encoder
    attention = encoder.encoder.block[1].layer[0].SelfAttention
    start_local(encoder)
    before, after = attention.compute_bias(6, 6)[0].detach()  # [6, 6], a row for each query
    assert before[4].argmax() in (3, 4) and before[4, 0] < before[4, 3] - 2
    assert after[1].argmax() in (1, 2) and after[1, 5] < after[1, 2] - 2
    assert (before[3, 4:] < -2).all() and (after[3, :3] < -2).all()
    start_local(encoder)  # no longer untrained
    assert torch.equal(attention.compute_bias(6, 6)[0], torch.stack((before, after)))


def test_a_batch_is_whole_and_its_labels_follow_the_images(objective: TextObjective) -> None:
    batch = objective.draw(torch.Generator().manual_seed(5), 32)
    again = objective.draw(torch.Generator().manual_seed(5), 32)
    for name, value in vars(batch).items():
        assert torch.equal(value, getattr(again, name)), name
    assert batch.images.shape == (32, 3, SIZE, SIZE) and batch.colors.shape == (32, 4)
    assert ((batch.masked != batch.alone).sum(1) > 0).float().mean() > 0.5
    end = batch.alone == TOKENIZER.eos_token_id
    assert torch.equal(batch.masked[end], batch.alone[end])
    # The patch's colour is the palette's, but for the jitter; the sphere (kind 1) is the near one.
    palette = preprocess_clip(
        (torch.tensor(list(COLORS.values())) * 255).byte()[..., None, None], 1
    )
    seen = batch.images[:, :, 7::14, 7::14].flatten(2).transpose(1, 2)
    assert (seen - palette.view(-1, 3)[batch.colors]).abs().max() < 0.7
    torch.testing.assert_close(batch.depths.exp(), 2.0 - batch.kinds)
    assert (batch.colors[:, 0] == batch.colors[:, 2]).all()  # both rows alike
    assert {tuple(row) for row in batch.kinds.tolist()} == {(0, 1, 0, 1), (1, 0, 1, 0)}


def test_what_shows_no_part_has_no_label() -> None:
    bare = clips(4, 1)
    bare.objects.fill_(NO_OBJECT)
    bare.depth.zero_()
    made = TextObjective(pipeline(), bare, clips(2, 2), options(), corpus=8)
    batch = made.draw(torch.Generator().manual_seed(0), 3)
    assert (batch.colors == -1).all() and (batch.kinds == -1).all()
    total, logs = made.loss(batch)
    assert total.isfinite() and logs["patches"] == 0


def test_equal_captions_are_no_negatives(objective: TextObjective) -> None:
    batch = objective.draw(torch.Generator().manual_seed(5), 1)
    twins = replace(batch, **{n: v.repeat(2, *[1] * (v.ndim - 1)) for n, v in vars(batch).items()})
    one, two = (objective.loss(b)[1]["contrast"] for b in (batch, twins))
    # Two more wrong captions would raise the loss; here there is one more, the recoloured twin.
    scores = objective.loss(twins)[0]
    assert scores.isfinite() and one < two < one + 1


def test_it_learns(objective: TextObjective) -> None:
    """Colours and nouns of even images, in some seconds; only what the pipeline runs is changed."""
    before = copy.deepcopy(objective.module.state_dict())
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(45):
        total, logs = objective.loss(objective.draw(chance, 32))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert set(logs) == {"contrast", "patches", "binding", "words", "scale"}
    assert all(not value.requires_grad and value.ndim == 0 for value in logs.values())
    changed = {n for n, v in objective.module.state_dict().items() if not torch.equal(v, before[n])}
    prefix = "clip_image_encoder."
    assert not any(n.startswith((f"{prefix}encoder.layers.2", f"{prefix}post")) for n in changed)
    values = objective.evaluate()
    assert objective.evaluate() == values
    assert values["color"] > 0.9 and values["noun"] > 0.85
    assert values["patch_color"] > 0.8 and values["retrieval_5"] > 0.8
    assert 0.8 < values["text_rms"] < 1.2
    text = objective.components["text_encoder"]
    ids = tokenize(TOKENIZER, ["bad detailed", ""], 64, CPU)
    features = encode_text(cast(Any, text), ids, (ids != TOKENIZER.pad_token_id).long())
    assert features.isfinite().all()
    assert not torch.allclose(features[0, 0], features[1, 0], atol=0.1)


def test_captions_of_scenes_are_one_token_a_word() -> None:
    """The fixed list of words in gen3r against the grammar in gen3r_training."""
    captions = caption_corpus(500, 11)
    split = {w for c in captions for w in c.replace(",", " ,").split()} - {","}
    known = {w for w in split if len(TOKENIZER(w, add_special_tokens=False).input_ids) == 1}
    assert split == known
    lengths = [len(TOKENIZER(c).input_ids) for c in captions]
    assert max(lengths) < 50 and sorted(lengths)[len(lengths) * 9 // 10] < 40
