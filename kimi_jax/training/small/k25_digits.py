"""The recipe of k25-digits: a Kimi K2.5 of 1.1 million parameters that reads handwritten numbers and calls a tool.

Its three stages are K2.5's own order (arXiv 2602.02276): captions, which train the tower's eye, then conversations.
Captions begin with numbers of one digit, then two, then three: without that the loss rests where the format is known
and the digits are not seen.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from checkpoints.toy import toy_config
from kimi_jax.media.conversation import read_all
from kimi_jax.processor import Processor
from kimi_jax.text import chat
from kimi_jax.training.packing import Room
from kimi_jax.training.samples import Document, documents
from kimi_jax.training.small import conversations, digits
from kimi_jax.training.small.batches import Source
from kimi_jax.training.small.conversations import Draw
from kimi_jax.training.small.recipe import Conversation, SmallRecipe, Stage

# fmt: off
CONFIG = toy_config(
    "k2.5", hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64,
    kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=256,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
    vt_hidden_size=64, vt_intermediate_size=128, vt_num_attention_heads=4, vt_num_hidden_layers=2,
)
# Shares of the documents of each stage
MIXES = (
    {"caption": 0.85, "read": 0.08, "read with a tool": 0.02, "add pictures": 0.02, "add text": 0.02, "talk": 0.01},
    {"caption": 0.20, "caption of two": 0.10, "read": 0.34, "read with a tool": 0.06, "add pictures": 0.17,
     "add text": 0.04, "talk": 0.04, "mixed": 0.05},
    {"caption": 0.10, "caption of two": 0.10, "read": 0.16, "read with a tool": 0.05, "add pictures": 0.35,
     "add text": 0.05, "talk": 0.04, "mixed": 0.15},
)
# fmt: on
ROOM = Room(tokens=256, labels=112, documents=16, patches=384)
# Numbers of the pictures in the package, each with a seed that gave clear digits
PICTURES = {"7": 5, "12": 8, "58": 6, "316": 8, "427": 9}
# Shares of the first stage up to which numbers have one digit, and two
ONE_DIGIT, TWO_DIGITS = 0.2, 0.3


def recipe() -> SmallRecipe:
    """Returns the recipe."""
    return SmallRecipe(
        name="k25-digits",
        config=CONFIG,
        text=_text(),
        stages=(
            Stage(600, functools.partial(_source, 0), ROOM, 3.5e-3),
            Stage(400, functools.partial(_source, 1), ROOM, 3.5e-3),
            Stage(650, functools.partial(_source, 2), ROOM, 2.5e-3, end=0.03),
        ),
        measures={
            "single digits": functools.partial(_measured, functools.partial(conversations.read, least=1, most=1)),
            "3-digit numbers": functools.partial(_measured, functools.partial(conversations.read, least=3)),
            "read, a tool declared": functools.partial(_measured, functools.partial(conversations.read, tools=True)),
            "add two pictures": functools.partial(
                _measured, functools.partial(conversations.add_pictures, one_picture=0.0)
            ),
            "add two numbers in one picture": functools.partial(
                _measured, functools.partial(conversations.add_pictures, one_picture=1.0)
            ),
            "add two numbers in words": functools.partial(_measured, conversations.add_text),
            "talk": functools.partial(_measured, conversations.talk),
            "one after another": functools.partial(_measured, conversations.mixed),
        },
    )


def _source(stage: int, processor: Processor, share: float) -> Source:
    """Returns what draws the documents of a stage, given the share of it that is done."""
    mix, most = MIXES[stage], 3
    if stage == 0 and share < TWO_DIGITS:
        most = 1 if share < ONE_DIGIT else 2
    kinds, weights = list(mix), np.array(list(mix.values()))

    def draw_documents(random: np.random.Generator) -> Sequence[Document]:
        draw = _draw(random, held_out=False)
        kind = kinds[random.choice(len(kinds), p=weights / weights.sum())]
        if kind == "caption":
            return [caption(conversations.number(random, most), draw, processor)]
        if kind == "caption of two":
            return [caption("\n".join(conversations.number(random) for _ in range(2)), draw, processor)]
        makers: dict[str, Callable[[np.random.Generator, Draw], Conversation]] = {
            "read": functools.partial(conversations.read, most=most),
            "read with a tool": functools.partial(conversations.read, most=most, tools=True),
            "add pictures": conversations.add_pictures,
            "add text": conversations.add_text,
            "talk": conversations.talk,
            "mixed": conversations.mixed,
        }
        return documents(makers[kind](random, draw), processor)

    return draw_documents


def caption(text: str, draw: Draw, processor: Processor) -> Document:
    """Returns a picture of a number, or of several, a line each, followed by what it says, without a conversation."""
    found = read_all([("image", draw(text))], processor.media_config)
    ((_, height, width),) = found.grids
    special, tokenizer = processor.tokenizer.special_tokens, processor.tokenizer
    placeholders = [special["<|media_pad|>"]] * (height * width // 4)
    shown = [*tokenizer.encode("image"), special["<|media_content|>"], *placeholders, special["<|media_end|>"]]
    written = [*tokenizer.encode(text), special["<|im_end|>"]]
    tokens = np.array([special["<|media_begin|>"], *shown, *written], np.int32)
    return Document(tokens, np.arange(len(tokens)) > len(shown), found.patches, np.array(found.grids, np.int32))


def _draw(random: np.random.Generator, *, held_out: bool) -> Draw:
    hand = digits.PLAIN if held_out else digits.VARIED
    return lambda text: digits.draw_number(text, digits.load(held_out), hand, random)


def _measured(make: Callable[[np.random.Generator, Draw], Conversation], random: np.random.Generator) -> Conversation:
    return make(random, _draw(random, held_out=True))


@functools.cache
def _text() -> str:
    """Returns conversations as the chat template writes them, without its markers."""
    random, written = np.random.default_rng(0), []
    for number in range(400):
        tools = number % 2 == 0
        for drawn in (
            conversations.read(random, _blank, tools=tools),
            conversations.add_pictures(random, _blank),
            conversations.add_text(random, _blank),
            conversations.talk(random, _blank),
            conversations.delegate(random),
        ):
            text = chat.render(
                drawn["messages"],
                drawn.get("tools"),
                drawn["thinking"],
                preserve_thinking=True,
                add_generation_prompt=False,
            )
            written.append(re.sub(r"<\|[^|>]*\|>|</?think>", "\n", text))
    return "\n".join(written)


def _blank(text: str) -> np.ndarray:
    return np.full((digits.CELL, digits.CELL, 3), 255, np.uint8)


def pictures() -> dict[str, np.ndarray]:
    """Draws the pictures that `kimi_jax.small.picture` gives, by their numbers, of digits that are held out."""
    return {
        number: digits.draw_number(number, digits.load(True), digits.PLAIN, np.random.default_rng((int(number), seed)))
        for number, seed in PICTURES.items()
    }
