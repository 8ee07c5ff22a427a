"""The two encoders apart from the fixtures: key maps, meta construction, prompts, pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gen3r.config import GEN3R, ImageEncoderConfig, TextEncoderConfig
from gen3r.encoder_keys import IMAGE_KEY_MAP, TEXT_KEY_MAP, KeyMap
from gen3r.encoders import (
    build_image_encoder,
    build_text_encoder,
    encode_image,
    encode_text,
    expected_image_tensors,
    expected_text_tensors,
    finish,
    image_encoder_from_upstream,
    image_encoder_to_upstream,
    preprocess_clip,
    text_encoder_from_upstream,
    text_encoder_to_upstream,
    to_uint8,
    tokenize_and_encode,
)
from tests.manifest import manifest_shapes

TEXT = TextEncoderConfig(vocab=20, dim=16, dim_attn=32, dim_ffn=24, num_heads=4, num_layers=2)
IMAGE = ImageEncoderConfig(image_size=28, vision_dim=16, vision_heads=2, vision_layers=3)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def text_model() -> torch.nn.Module:
    model = build_text_encoder(TEXT)
    state = random_state(expected_text_tensors(TEXT))
    model.load_state_dict(text_encoder_from_upstream(state), strict=True)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "room", "with", "bed"])
    }
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_text_layout_is_the_checkpoint_s() -> None:
    assert expected_text_tensors(GEN3R.text_encoder) == manifest_shapes("text_encoder")


def test_image_layout_is_the_checkpoint_s() -> None:
    shapes = manifest_shapes("clip_image_encoder")
    used = {name: shape for name, shape in shapes.items() if not IMAGE_KEY_MAP.is_unused(name)}
    assert expected_image_tensors(GEN3R.clip_image_encoder) == used
    unused = set(shapes) - set(used)
    assert {"model.log_scale", "model.visual.head"} < unused
    assert all(
        n.startswith("model.textual.") for n in unused - {"model.log_scale", "model.visual.head"}
    )


def test_round_trips() -> None:
    text = random_state(expected_text_tensors(TEXT))
    image = random_state(expected_image_tensors(IMAGE))
    for state, there, back in (
        (text, text_encoder_from_upstream, text_encoder_to_upstream),
        (image, image_encoder_from_upstream, image_encoder_to_upstream),
    ):
        returned = back(there(state))
        assert returned.keys() == state.keys()
        assert all(torch.equal(returned[name], state[name]) for name in state)


@pytest.mark.parametrize("which", ["text", "image"])
def test_built_on_meta_and_filled_tensor_by_tensor(which: str) -> None:
    with torch.device("meta"):
        model = build_text_encoder(TEXT) if which == "text" else build_image_encoder(IMAGE)
    keys: KeyMap = TEXT_KEY_MAP if which == "text" else IMAGE_KEY_MAP
    state = random_state(keys.expected(model))
    for name, tensor in state.items():
        assert [n for n, _ in keys.from_upstream(name, tensor)] == list(keys.our_names(name))
        for ours, part in keys.from_upstream(name, tensor):
            owner, _, leaf = ours.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, torch.nn.Parameter(part.clone(), requires_grad=False))
    finish(model)
    assert not [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    whole = build_text_encoder(TEXT) if which == "text" else build_image_encoder(IMAGE)
    whole.load_state_dict(keys.state_from_upstream(state), strict=True)
    if which == "text":
        ids = torch.randint(0, TEXT.vocab, (2, 5))
        ours, theirs = (encode_text(m, ids, torch.ones_like(ids)) for m in (model, whole))
        assert model.encoder.embed_tokens.weight is model.shared.weight
    else:
        pixels = torch.randn(2, 3, 28, 28)
        ours, theirs = (encode_image(m, pixels) for m in (model, whole))
    assert torch.equal(ours, theirs)


def test_bad_names_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"unexpected tensor 'blocks\.0\.attn\.x\.weight'"):
        TEXT_KEY_MAP.from_upstream("blocks.0.attn.x.weight", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="leading axes"):
        IMAGE_KEY_MAP.from_upstream("model.visual.cls_embedding", torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="split in 3"):
        name = "model.visual.transformer.0.attn.to_qkv.bias"
        IMAGE_KEY_MAP.from_upstream(name, torch.zeros(4))
    with pytest.raises(ValueError, match="no upstream name"):
        TEXT_KEY_MAP.state_to_upstream({"decoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="is not"):
        part = "encoder.layers.0.self_attn.q_proj.bias"
        IMAGE_KEY_MAP.state_to_upstream({part: torch.zeros(4)})
    assert IMAGE_KEY_MAP.from_upstream("model.textual.norm.bias", torch.zeros(4)) == []
    with pytest.raises(ValueError, match="dim_attn 30"):
        build_text_encoder(TextEncoderConfig(dim_attn=30, num_heads=4))


def test_prompts_of_different_length() -> None:
    model, words = text_model(), tokenizer()
    prompts = ["a red room with a bed", "", "bed"]
    together = tokenize_and_encode(words, model, prompts, max_length=12)
    assert [list(t.shape) for t in together] == [[7, 16], [1, 16], [2, 16]]
    for prompt, features in zip(prompts, together, strict=True):
        (alone,) = tokenize_and_encode(words, model, [prompt], max_length=40)
        assert (features - alone).abs().max() <= 2e-5 * alone.abs().max()
    (cut,) = tokenize_and_encode(words, model, prompts[:1], max_length=4)
    assert cut.shape == (4, 16)


def test_images_of_a_batch_are_independent() -> None:
    model = build_image_encoder(IMAGE)
    state = random_state(expected_image_tensors(IMAGE))
    model.load_state_dict(image_encoder_from_upstream(state), strict=True)
    pixels = preprocess_clip(torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8), 28)
    together = encode_image(model, pixels)
    assert together.shape == (2, 5, 16)
    for i in range(2):
        alone = encode_image(model, pixels[i : i + 1])
        assert (together[i : i + 1] - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_bytes_are_truncated() -> None:
    values = torch.tensor([-0.1, 0.0, 0.9999, 1.0, 1.1, 127.9 / 255])
    assert to_uint8(values).tolist() == [0, 0, 254, 255, 255, 127]


def test_pixels_need_bytes() -> None:
    with pytest.raises(ValueError, match="to_uint8"):
        preprocess_clip(torch.rand(1, 3, 8, 8))
