"""The recipe of kimi-linear-small: a Kimi Linear of 0.9 million parameters that copies, recalls and adds in text.

Three of its layers are KDA and one is attention. Lists to recall from grow to 160 things, 1,000 tokens.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from checkpoints.toy import toy_config
from kimi_jax.processor import Processor
from kimi_jax.text import chat
from kimi_jax.training.packing import Room
from kimi_jax.training.samples import Document, documents
from kimi_jax.training.small.batches import Source
from kimi_jax.training.small.recipe import Conversation, SmallRecipe, Stage

# fmt: off
CONFIG = toy_config(
    "kimi-linear", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=256,
    num_experts=8, num_experts_per_token=2, moe_intermediate_size=32,
    linear_attn_config={
        "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4,
    },
)
COLOURS = (
    "red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "dark", "pale", "old", "new", "big",
    "tiny", "long",
)
THINGS = (
    "dog", "cat", "bird", "fish", "horse", "house", "door", "box", "book", "lamp", "chair", "table", "cup", "boat",
    "train", "car", "tree", "stone", "river", "cloud", "star", "moon", "key", "bell", "coat", "shoe", "hat", "ring",
    "song", "road", "hill", "field",
)
# fmt: on
MOST_THINGS, MOST_WORDS = 160, 24
QUESTIONS = 5  # about one list, in training: a list of 1,000 tokens would have two labels otherwise
SHORT = Room(tokens=320, labels=160, documents=5, patches=0)
LONG = Room(tokens=1152, labels=160, documents=6, patches=0)
HELLO = "Hello! Give me a list to remember, words to copy, or two numbers to add."


def recipe() -> SmallRecipe:
    """Returns the recipe."""
    return SmallRecipe(
        name="kimi-linear-small",
        config=CONFIG,
        text=_text(),
        stages=(
            Stage(800, functools.partial(_source, _short), SHORT, 2.5e-3),
            Stage(250, functools.partial(_source, _long), LONG, 2e-3, end=0.03, rows=4),
        ),
        measures={
            "copy": functools.partial(copy, words=MOST_WORDS),
            "recall one of 20": functools.partial(recall, things=20),
            "recall one of 160 (1,000 tokens)": functools.partial(recall, things=MOST_THINGS),
            "add two numbers": add,
        },
    )


def copy(random: np.random.Generator, words: int) -> Conversation:
    """Asks for a copy of up to `words` words and digits."""
    count = int(random.integers(1, words + 1))
    every = (*COLOURS, *THINGS, *"0123456789")
    text = " ".join(every[i] for i in random.integers(len(every), size=count))
    return _conversation(f"Copy: {text}", text)


def recall(random: np.random.Generator, things: int, questions: int = 1) -> Conversation:
    """Shows a list of `things` things with a number each, and asks for some of them one after another.

    The answer is the thing with its number, as the list has it.
    """
    chosen = random.permutation(len(COLOURS) * len(THINGS))[:things]
    names = [f"{COLOURS[i % len(COLOURS)]} {THINGS[i // len(COLOURS)]}" for i in chosen]
    values = random.integers(10, 100, size=things)
    listed = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    turns: list[str] = []
    for asked in random.integers(things, size=questions):
        turns += [f"Which number has the {names[asked]}?", f"{names[asked]} {values[asked]}"]
    return _conversation(f"Remember: {listed}.\n{turns[0]}", *turns[1:])


def add(random: np.random.Generator) -> Conversation:
    """Asks for the sum of two numbers of up to three digits, which the answer makes from the right, with carries."""
    a, b = (int(random.integers(10 ** random.integers(1, 4))) for _ in range(2))
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        digits = [a // 10**place % 10, b // 10**place % 10, carry]
        steps.append(f"{digits[0]} + {digits[1]} + {carry} = {sum(digits)}")
        carry = sum(digits) // 10
    return _conversation(f"What is {a} + {b}?", f"{'. '.join(steps)}. So {a + b}.")


def talk(random: np.random.Generator) -> Conversation:
    """Greets."""
    return _conversation(("Hello!", "Hi", "Who are you?", "What can you do?")[random.integers(4)], HELLO)


def _conversation(*turns: str) -> Conversation:
    """Returns the conversation of these turns, the user's and the assistant's in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"messages": messages, "thinking": False}


def _short(random: np.random.Generator, share: float) -> Conversation:
    """Draws a conversation of at most 320 tokens; lists and copies grow with the share that is done."""
    longest = min(1.0, 0.1 + 1.5 * share)
    kind = random.choice(4, p=(0.15, 0.5, 0.32, 0.03))
    if kind == 0:
        return copy(random, max(2, int(MOST_WORDS * longest)))
    if kind == 1:
        return recall(random, int(random.integers(2, max(4, int(30 * longest)))), int(random.integers(1, QUESTIONS)))
    return add(random) if kind == 2 else talk(random)


def _long(random: np.random.Generator, share: float) -> Conversation:
    """Draws a conversation of at most 1,152 tokens; lists grow with the share that is done."""
    if random.random() < 0.4:
        most = max(40, int(MOST_THINGS * min(1.0, 0.3 + 2 * share)))
        return recall(random, int(random.integers(20, most + 1)), QUESTIONS)
    return _short(random, 1.0)


def _source(draw: Callable[[np.random.Generator, float], Conversation], processor: Processor, share: float) -> Source:
    def draw_documents(random: np.random.Generator) -> Sequence[Document]:
        return documents(draw(random, share), processor)

    return draw_documents


@functools.cache
def _text() -> str:
    """Returns conversations as the chat template writes them, without its markers."""
    random = np.random.default_rng(0)
    drawn = [make for _ in range(100) for make in (copy(random, 10), recall(random, 10), add(random), talk(random))]
    return "\n".join(chat.render(one["messages"], model="k2").replace("<|", "\n").replace("|>", "\n") for one in drawn)
