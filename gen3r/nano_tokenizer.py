"""The embedded model's tokenizer: one token a word for the words of its captions, bytes for others.

The vocabulary is a fixed list, so ids are the same with every version of the tokenizers library:
three special tokens, the 256 bytes, then `WORDS`. A word of that list is looked up as a whole
(`ignore_merges`); there are no merges, so that any other word becomes one token a byte. Letters are
lowered first. ``</s>`` is appended, as umt5's tokenizer does.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 512  # rows of the text encoder's table; the last ones are free
SPECIAL = ("<pad>", "</s>", "<unk>")

_COLORS = "red orange yellow green blue purple white grey black brown"

# What the captions of procedural scenes are made of; a test holds this list against their grammar.
_CAPTIONS = """
a an the with and
two three four five six
room courtyard floor ceiling far wall
box boxes cabinet cabinets table tables bench benches sphere spheres lamp lamps barrel barrels
cylinder cylinders column columns arch arches door doors picture pictures shutter shutters rug rugs
brick plank tile checkered striped marble panel
"""

# Words of the negative prompt and of prompts that a person may write: known, each one token.
_OTHERS = """
bad detailed blurry quality
one in under of on not no without at to from into by near behind beside between above below over
left right middle centre center front back corner side top bottom up down
forward backward camera view moves moving turns still path
hall gallery corridor scene house building garden street square bedroom kitchen bathroom office
museum arena temple castle tower church bridge pool yard hallway studio
walls floors ceilings cube cubes ball balls pillar pillars block blocks window windows
chair chairs bed shelf shelves sofa carpet stairs fence roof beam cone cones pyramid ring statue
vase plant plants tree trees grass sky sun sunny cloud clouds water ground sand rock rocks
bricks planks stone plaster tiles tiled wood wooden metal concrete glass paper cloth leather iron
painted polished patterned
small large tall low wide narrow open light lights dark bright soft warm cold shadow shadows shiny
glossy matte rough smooth old new clean empty quiet round flat high short long big little huge tiny
thick thin many several few some gray pink gold silver beige cyan magenta violet turquoise pale deep
photo image video realistic
"""

WORDS = tuple(dict.fromkeys(f"{_COLORS} {_CAPTIONS} {_OTHERS}".split()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, a pure function: word tokens with a byte fallback, ``</s>`` at the end.

    "A red room" becomes the ids of "a", "red", "room" and ``</s>``; a comma is a token of its own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The byte-level pre-tokenizer writes the space before a word as "Ġ".
    pieces = [*SPECIAL, *alphabet, *(f"Ġ{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
