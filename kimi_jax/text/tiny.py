"""Writes a synthetic tokenizer in the published file layout, small enough for tests, the demo and toy checkpoints.

It has 512 base ranks (the 256 bytes, in the order of GPT-2's byte table as in Kimi's own file, then 256 merges by
byte-pair encoding from the text below) and 256 special slots at the offsets from the base that the real tokenizer
uses (`tokenizer_config.json` of Kimi-K2.5): `[BOS]` 512, `[EOS]` 513, `<|im_end|>` 514, `<|media_pad|>` 533, `[PAD]`
767. A toy of a larger vocabulary has more ranks, of printable characters, and its special slots after them.
"""

import base64
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

BASE_RANKS = 512

Slots = Mapping[int, tuple[str, bool]]  # offset from the base -> (content, special)

# Those of K2 and K2.5; think and tool tokens are added tokens with special=false, as published
K25_SLOTS: Slots = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    6: ("<|start_header_id|>", True),
    7: ("<|end_header_id|>", True),
    9: ("[EOT]", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    18: ("<|media_begin|>", True),
    19: ("<|media_content|>", True),
    20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}
K3_SLOTS: Slots = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|end_of_msg|>", True),
    3: ("<|open|>", False),
    4: ("<|close|>", False),
    5: ("<|sep|>", False),
    6: ("[start_header_id]", True),
    7: ("[end_header_id]", True),
    9: ("[EOT]", True),
    18: ("<|media_begin|>", True),
    19: ("<|media_content|>", True),
    20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True),
    65: ("<osagent_mode>", True),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}

_CORPUS = """\
The user asks a question and the assistant gives an answer. You are a helpful assistant, and this is the system message.
What is the weather in Beijing today? It is sunny, with a light wind from the north-east and a high of twenty degrees.
Describe the image: there is a red square on the left, a blue circle on the right and a small black dog in between them.
The video shows a train leaving the station at ten in the morning; the people on the platform wave, and then it is gone.
def attention(query, key, value):
    scores = query @ key.T / math.sqrt(query.shape[-1])
    return softmax(scores) @ value
for index in range(10): print(index, "hello world", sep=": ")
{"type": "function", "function": {"name": "search", "parameters": {"query": "string"}}}
我是一个助手，可以回答问题。今天天气很好，我们去公园散步。图片里有一只小狗。
Because the model reads one token after another, every word that comes later can look back at those before it.
"""


def _byte_order() -> list[int]:
    """Returns bytes in the order of GPT-2's `bytes_to_unicode`, which Kimi's ranks 0..255 follow: printable Latin-1
    first, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    merged, at = [], 0
    while at < len(word):
        step = 2 if word[at : at + 2] == pair else 1
        merged.append(b"".join(word[at : at + step]))
        at += step
    return tuple(merged)


@functools.cache
def _ranks(text: str) -> dict[bytes, int]:
    ranks = {bytes([byte]): rank for rank, byte in enumerate(_byte_order())}
    pieces = re.findall(r" ?[^\W\d_]+|\d| ?[^\s\w]+|\s+|_", _CORPUS + text)
    words = Counter(tuple(bytes([byte]) for byte in piece.encode()) for piece in pieces)
    while len(ranks) < BASE_RANKS:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(b"".join(best), len(ranks))
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            merged[_merge(word, best)] += count
        words = merged
    return ranks


def _words(text: str, count: int) -> Iterator[bytes]:
    """Yields the tokens of `count` ranks: those that are learned, then two and more printable characters each."""
    learned = _ranks(text)
    printable = range(0x20, 0x7F)
    more = (bytes(word) for length in (2, 3, 4) for word in itertools.product(printable, repeat=length))
    return itertools.islice(itertools.chain(learned, (word for word in more if word not in learned)), count)


def write_tiny_tokenizer(
    folder: str | Path, text: str = "", *, base_ranks: int = BASE_RANKS, slots: Slots = K25_SLOTS
) -> None:
    """Writes `tiktoken.model` and `tokenizer_config.json` into `folder`, which is created if missing.

    Merges are learned from the text below and from `text`. Every call writes the same bytes. The tokenizer has
    `base_ranks` ids and 256 special slots after them, of which `slots` names some. Raises ValueError for fewer ranks
    than there are bytes.
    """
    if base_ranks < 256:
        raise ValueError(f"a tokenizer of {base_ranks} base ranks, expected 256 or more: each byte has one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tiktoken.model").open("w") as file:
        for rank, token in enumerate(_words(text, base_ranks)):
            file.write(f"{base64.b64encode(token).decode()} {rank}\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(base_ranks + offset): {"content": content, **flags, "special": special}
            for offset, (content, special) in slots.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
