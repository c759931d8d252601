"""Conversations to samples: which tokens of a conversation a model is trained on, exactly as it would generate them.

A template keeps the reasoning of a chain of tool calls until an answer without calls ends the chain, and drops it after
that. A finished conversation rendered once has therefore lost the reasoning before its calls. So every chain is a
sample of its own: earlier answers without reasoning, as in a prompt, and then the chain with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.messages import REASONING, read_messages
from kimi_jax.text.tools import Tools

# What config.json calls `ignore_index`
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """`tokens` int32 [t], and which of them an assistant generates: `trained` bool [t].

    They render the conversation's first `messages` messages, whose images and videos they have placeholders of.
    """

    tokens: np.ndarray
    trained: np.ndarray
    messages: int

    @property
    def labels(self) -> np.ndarray:
        """The token that follows each, int32 [t], and -100 where it is not trained on."""
        following = np.where(self.trained, self.tokens, IGNORED)
        return np.append(following[1:], IGNORED).astype(np.int32)

    def expand_media(self, placeholder_id: int, counts: Sequence[int]) -> "Sample":
        """Returns the sample with the placeholder of each media item repeated `counts` times, none of them trained on.

        Raises:
          ValueError: there are more or fewer placeholders than counts.
        """
        places = self.tokens == placeholder_id
        if places.sum() != len(counts):
            raise ValueError(f"the sample has {places.sum()} media placeholders, expected {len(counts)}")
        repeats = np.ones(len(self.tokens), int)
        repeats[places] = counts
        return Sample(np.repeat(self.tokens, repeats), np.repeat(self.trained & ~places, repeats), self.messages)


def make_samples(
    tok: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools = None,
    thinking: bool = True,
    model: str | Path = "k2.5",
) -> list[Sample]:
    """Returns a sample for each chain of the conversation's assistant messages, none where there is no such message.

    A chain is an answer without tool calls and the calls before it. Trained on are, of each of its messages, reasoning,
    content, calls and `<|im_end|>`: what follows the prompt that a model is given at that point. Arguments are those of
    `chat.encode`.

    Raises:
      ValueError: where `chat.encode` does, and where the template does not write an answer as it would be generated.
    """
    plain = read_messages(messages)
    samples = []
    for start, chain in _chains(plain):
        known = [message if thinking and i >= start else _without_reasoning(message) for i, message in enumerate(plain)]
        tokens: list[int] = []
        spans = []
        for i in chain:
            asked = chat.encode(tok, plain[:i], tools, thinking, model) if i else []
            prompt = chat.encode(tok, known[:i], tools, thinking, model, preserve_thinking=True) if i else []
            whole = chat.encode(
                tok, known[: i + 1], tools, thinking, model, preserve_thinking=True, add_generation_prompt=False
            )
            if not i or asked != prompt or whole[: len(prompt)] != prompt or prompt[: len(tokens)] != tokens:
                raise ValueError(
                    f"messages[{i}]: the template does not write this answer after the prompt that asks for it"
                )
            tokens = whole
            spans.append(slice(len(prompt), len(whole)))
        trained = np.zeros(len(tokens), bool)
        for span in spans:
            trained[span] = True
        samples.append(Sample(np.asarray(tokens, np.int32), trained, chain[-1] + 1))
    return samples


def _chains(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[int]]]:
    """Yields, for each chain, the number of its first message and those of its assistant messages."""
    start, chain = 0, []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        chain.append(i)
        if not message.get("tool_calls"):
            yield start, chain
            start, chain = i + 1, []
    if chain:
        yield start, chain


def _without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in REASONING}
