"""Turns conversations into documents to train on: tokens, and which of them an assistant wrote.

The loss is on what an assistant generates at inference, under the prompt that it then has, and on nothing else: not on
headers, user, system and tool messages, tool declarations and media. Rendering a finished conversation once would be
wrong: its last answer makes the template drop the reasoning before the calls of tools, and the model would never be
trained to think before it calls. So every assistant message is rendered under its own prompt; where that begins with
the document so far, as within a chain of tool calls, the document goes on, and elsewhere a new one begins.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax import json_reader, media
from kimi_jax.media.conversation import read_all
from kimi_jax.printable import printable
from kimi_jax.processor import Processor
from kimi_jax.text import chat
from kimi_jax.text.messages import REASONING, read_messages

_FIELDS = ("messages", "tools", "thinking")


@dataclasses.dataclass(frozen=True)
class Document:
    """One sequence to train on.

    tokens: int32 [t], media placeholders expanded; trained: bool [t], the tokens that an assistant wrote.
    patches, grids: the images and videos of the placeholders, in their order, as in `Media`; None without any.
    """

    tokens: np.ndarray
    trained: np.ndarray
    patches: np.ndarray | None = None
    grids: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Returns the columns at which the next token is trained, int32."""
        return np.flatnonzero(self.trained[1:]).astype(np.int32)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Returns what the document takes of a row's room: tokens, labels, one document, patches."""
        return len(self.tokens), len(self.labels), 1, 0 if self.patches is None else len(self.patches)


def read_documents(path: str | Path, processor: Processor) -> Iterator[Document]:
    """Yields the documents of a file of conversations, a JSON object in each line: `messages` in OpenAI's schema, with
    `tools` and `thinking` (true where it is not given) if wanted. Paths of images are relative to the file.

    Raises ValueError or OSError naming file, line and field where a line is no conversation.
    """
    path = Path(path)
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            where = f"{printable(path)}: line {number}"
            fields = json_reader.parse_object(data, where)
            try:
                yield from documents(fields, processor, files=path.parent)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def documents(
    conversation: Mapping[str, Any], processor: Processor, *, files: str | Path | None = None
) -> list[Document]:
    """Returns the documents of a conversation with `messages`, and `tools` and `thinking` if it has them.

    `files` is the folder whose files messages may name; None allows none. Raises ValueError or OSError naming the field
    that is wrong.
    """
    for name in conversation:
        if name not in _FIELDS:
            raise ValueError(f"has the field {printable(name)!r}, expected {', '.join(_FIELDS)}")
    thinking = conversation.get("thinking", True)
    if not isinstance(thinking, bool):
        raise ValueError(f"thinking is {printable(thinking)!r}, expected true or false")
    messages = read_messages(conversation.get("messages"))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("messages: no message is an assistant's, so that there is nothing to train on")
    folder = None if files is None else Path(files)
    parts = [
        (part.kind, media.from_message(part.source, folder)) for part in chat.media_parts(conversation["messages"])
    ]
    pictures = read_all(parts, processor.media_config) if parts and processor.config.vision else None
    if parts and pictures is None:
        raise ValueError(f"messages hold {len(parts)} images or videos; this model takes none")
    videos, sizes = ((), ()) if pictures is None else (pictures.videos, pictures.sizes)

    def encode(messages: Sequence[Mapping[str, Any]], *, prompts: bool = True, keep: bool = True) -> list[int]:
        kinds = [part.kind for part in chat.media_parts(messages)]
        return chat.encode(
            processor.tokenizer,
            messages,
            conversation.get("tools"),
            thinking,
            processor.template,
            preserve_thinking=keep,
            add_generation_prompt=prompts,
            videos=videos[: kinds.count("video")],
            image_sizes=sizes[: kinds.count("image")],
        )

    found: list[tuple[list[int], list[bool]]] = []
    for index in answers:
        shown = _as_seen(messages[: index + 1], thinking)
        if not index:
            raise ValueError("messages[0] is an assistant's, expected a message to answer before it")
        prompt, whole = encode(shown[:-1]), encode(shown, prompts=False)
        if prompt != encode(messages[:index], keep=False) or whole[: len(prompt)] != prompt:
            raise ValueError(f"messages[{index}]: the chat template writes it otherwise than after its prompt")
        written = [False] * len(prompt) + [True] * (len(whole) - len(prompt))
        if found and prompt[: len(found[-1][0])] == found[-1][0]:
            _, before = found.pop()
            written[: len(before)] = before
        found.append((whole, written))
    return [
        _with_media(np.array(tokens, np.int32), np.array(written), pictures, processor) for tokens, written in found
    ]


def _as_seen(messages: Sequence[Mapping[str, Any]], thinking: bool) -> list[dict[str, Any]]:
    """Returns a conversation up to an answer with the reasoning that the model has before it when it writes the answer:
    none without thinking, else that of the chain of tool calls which the answer continues."""
    ended = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant" and not m.get("tool_calls")]
    first = ended[-1] + 1 if ended else 0
    return [
        dict(message)
        if thinking and index >= first
        else {key: value for key, value in message.items() if key not in REASONING}
        for index, message in enumerate(messages)
    ]


def _with_media(
    tokens: np.ndarray, written: np.ndarray, pictures: media.conversation.Patches | None, processor: Processor
) -> Document:
    """Expands media placeholders, and adds the patches of those that the document has: the conversation's first."""
    placeholder = processor.config.media_placeholder_token_id
    here = np.zeros(len(tokens), bool) if placeholder is None else tokens == placeholder
    if not here.any():
        return Document(tokens, written)
    assert pictures is not None and processor.config.vision is not None
    grids = np.array(pictures.grids[: int(here.sum())], np.int32)
    kh, kw = processor.config.vision.merge_kernel_size
    repeats = np.ones(len(tokens), np.int64)
    repeats[here] = grids[:, 1] // kh * (grids[:, 2] // kw)
    patches = pictures.patches[: int(grids.prod(axis=1).sum())]
    return Document(np.repeat(tokens, repeats), np.repeat(written & ~here, repeats), patches, grids)
