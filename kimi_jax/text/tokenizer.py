"""Encodes and decodes text with Kimi's tokenizer, from the published `tiktoken.model` and `tokenizer_config.json`.

The pattern, the 256 special slots after the base ranks and the two limits on what reaches tiktoken at once are those of
Moonshot's `tokenization_kimi.py`. `&&` in the pattern is set intersection, which tiktoken's Rust regex knows.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import SupportsIndex

import tiktoken

from kimi_jax.printable import printable
from kimi_jax.text.tokenizer_files import named_ids, read_config, read_ranks, special_tokens

PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000


def _long_runs(text: str) -> Iterator[range]:
    """Yields the places of the runs of space, or of other characters, that are longer than `MAX_RUN_CHARS`.

    Of windows of half that length, side by side, such a run fills at least one. All other windows hold both kinds, and
    are left at the first character that is not of the kind of the first: most of a text is never looked at.
    """
    window, end = MAX_RUN_CHARS // 2 + 1, 0
    for at in range(0, len(text) - window + 1, window):
        kind = r"\s" if text[at].isspace() else r"\S"
        if at < end or not re.compile(f"{kind}{{{window}}}").match(text, at):
            continue
        before = re.match(f"{kind}*", text[max(0, at - window) : at][::-1])
        rest = re.compile(f"{kind}*").match(text, at)
        assert before and rest
        end = rest.end()
        if end - at + before.end() > MAX_RUN_CHARS:
            yield range(at - before.end(), end)


def _pieces(text: str) -> Iterator[str]:
    """Cuts `text` into pieces that tiktoken can take: at most 400,000 characters, no run of (non-)space over 25,000."""
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        piece = text[start : start + MAX_ENCODE_CHARS]
        begin = 0
        for run in _long_runs(piece):
            for cut in run[MAX_RUN_CHARS::MAX_RUN_CHARS]:
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into ids and ids into text. Build it with `from_folder`.

    special_tokens: content -> id, all 256 slots (unnamed ones are `<|reserved_token_{id}|>`).
    bos_id, eos_id, pad_id: ids of `bos_token`, `eos_token`, `pad_token`, None where the file says null; no BOS is ever
    added to a text.
    """

    encoding: tiktoken.Encoding
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads `tiktoken.model` and `tokenizer_config.json` in the folder `path`.

        Raises FileNotFoundError where one is missing and ValueError where one is damaged, both naming the file.
        """
        folder = Path(path)
        model, config_file = folder / "tiktoken.model", folder / "tokenizer_config.json"
        for file in (model, config_file):
            if not file.exists():
                raise FileNotFoundError(f"{printable(file)}: no such file; a Kimi tokenizer needs it")
        ranks = read_ranks(model)
        config = read_config(config_file)
        special = special_tokens(config, len(ranks), config_file)
        try:
            encoding = tiktoken.Encoding(
                name=str(model), pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            raise ValueError(f"{printable(config_file)}: tiktoken takes no such tokens ({printable(error)})") from error
        return cls(encoding=encoding, special_tokens=special, **named_ids(config, special, config_file))

    @property
    def vocab_size(self) -> int:
        """Returns the number of base ranks and special slots together; the highest id is one less."""
        return self.encoding.n_vocab

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Returns the ids of `text`.

        With `allow_special`, the published tokenizer's behaviour, special tokens spelled in it become their ids: never
        encode people's text so (`kimi_jax.chat.encode` does not). Without it they are encoded as ordinary text.
        """
        encode = self._encode_with_special if allow_special else self.encoding.encode_ordinary
        if len(text) <= MAX_RUN_CHARS:  # nothing to cut
            return encode(text)
        return list(chain.from_iterable(map(encode, _pieces(text))))

    def _encode_with_special(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Returns the bytes of `ids`, which may begin or end inside a character. Raises ValueError for unknown ids."""
        tokens = ids if isinstance(ids, list) else [int(i) for i in ids]
        try:
            return self.encoding.decode_bytes(tokens)
        except (KeyError, OverflowError):  # (tiktoken names no id that is negative or beyond its integers)
            unknown = next(i for i in tokens if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {unknown} is outside the vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD, as in the published tokenizer."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids that come one at a time, and holds back the bytes of a character that is not complete yet.

    The texts that `push` and `finish` return, joined, equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = False  # bytes of a character that is not complete

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text that `ids` complete, which may be empty."""
        data = self._tokenizer.decode_bytes(ids)
        if data.isascii() and not self._pending:
            return data.decode("ascii")  # (the incremental decoder is written in Python, and slower)
        text = self._utf8.decode(data)
        self._pending = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """Returns the rest at the end: U+FFFD for an unfinished character, else an empty text."""
        self._pending = False
        return self._utf8.decode(b"", final=True)
