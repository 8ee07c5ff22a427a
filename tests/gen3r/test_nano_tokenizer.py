"""The embedded model's tokenizer: one token a known word, bytes otherwise, never other ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen3r.checkpoint import load_tokenizer
from gen3r.nano_tokenizer import VOCABULARY, WORDS, build_tokenizer

TOKENIZER = build_tokenizer()
TEXTS = (
    "a red brick room with a grey tile floor, two white columns and a blue sphere",
    "A Zürich gobelin's  room.",
    "",
    "bad detailed",
)


def test_known_words_are_one_token_each() -> None:
    assert len(TOKENIZER) <= VOCABULARY
    ids = [TOKENIZER(word, add_special_tokens=False).input_ids for word in WORDS]
    assert all(len(row) == 1 for row in ids)
    assert len({row[0] for row in ids}) == len(WORDS)
    assert len(TOKENIZER(TEXTS[0]).input_ids) == len(TEXTS[0].split()) + 2  # "," and </s>


def test_ids_never_move() -> None:
    """A trained text encoder's rows belong to these ids."""
    assert TOKENIZER("<pad></s><unk>", add_special_tokens=False).input_ids == [0, 1, 2]
    assert TOKENIZER("a red, x sphere").input_ids == [269, 259, 14, 223, 90, 293, 1]
    assert TOKENIZER("realistic").input_ids == [508, 1]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_in_lower_case(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert ids[-1] == TOKENIZER.eos_token_id and TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True).removeprefix(" ") == text.lower()


def test_other_words_become_bytes() -> None:
    assert len(TOKENIZER(" ü", add_special_tokens=False).input_ids) == 3  # the space, two bytes


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert build_tokenizer().backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
