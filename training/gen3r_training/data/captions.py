"""Captions written by a vision-language model, made to look like prompts that people type."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

MAX_CHARACTERS = 1000
UNTOUCHED_SHARE = 0.2
SENTENCE_SHARE = 0.5

# "The image shows a ...", "The scene depicted in the images captures an ...": what the captioner
# writes before the content. Only before an article, so that "It is" can take its place.
_OPENING = re.compile(
    r"The (?:images?|scenes?|main visual content of the (?:scene|images?)"
    r"|scene depicted in the images?) "
    r"(?:shows?|depicts?|captures?|comprises?|presents?|features?|is of) (?=an? )"
)


def clean_prompt(prompt: str, draw: Callable[[], float] = random.random) -> str:
    """A caption as it is used for one training sample.

    Captions of more than 1000 characters become empty; 20 % stay untouched; of the others an
    opening such as "The image shows" goes: half the time the rest is capitalised ("A red car."),
    half the time it becomes a sentence ("It is a red car."). Rewritten captions lose surrounding
    white space.

    Parameters
    ----------
    draw : returns uniform numbers in [0, 1); called at most twice.
    """
    if len(prompt) > MAX_CHARACTERS:
        return ""
    if draw() < UNTOUCHED_SHARE:
        return prompt
    text = prompt.strip()
    opening = _OPENING.match(text)
    if opening is None:
        return text
    rest = text[opening.end() :]
    return "It is " + rest if draw() > SENTENCE_SHARE else rest[0].upper() + rest[1:]


def possible_prompts(prompt: str) -> tuple[str, ...]:
    """Everything that `clean_prompt` can make of a caption: at most three prompts."""
    scripts = ((0.0,), (1.0, 0.0), (1.0, 1.0))
    found = (clean_prompt(prompt, iter(script).__next__) for script in scripts)
    return tuple(dict.fromkeys(found))
