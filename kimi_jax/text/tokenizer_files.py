"""Reads and checks the tokenizer's published files, `tiktoken.model` and `tokenizer_config.json`, up to a bound."""

import base64
import binascii
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.printable import printable
from kimi_jax.text.files import read_bounded

NUM_SPECIAL_SLOTS = 256
_MAX_RANKS_BYTES = 2**25  # Kimi's has 2.8 MB
_MAX_CONFIG_BYTES = 2**23  # Kimi's has 5 KB; a file may contain chat templates too
_MAX_CONTENT = 1000  # characters of a special token

# A warning names keys of tokenizer_config.json other than these. Keys `..._token` are read where templates print them.
_READ = frozenset({"added_tokens_decoder", "chat_template"})
_HARMLESS = frozenset(
    {"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens", "tokenizer_class"}
    | {"processor_class", "auto_map", "model_max_length", "max_length", "clean_up_tokenization_spaces", "legacy"}
    | {"padding_side", "truncation_side", "pad_to_multiple_of", "pad_token_type_id", "model_input_names", "backend"}
    | {"stride", "truncation_strategy", "errors", "use_fast", "name_or_path", "special_tokens_map_file", "is_local"}
    | {"tokenizer_file", "vocab_file", "local_files_only", "transformers_version", "return_token_type_ids"}
)
# These change the ids of a text where they are true; no Kimi release sets them.
_REFUSED = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns token -> rank from tiktoken's text format, `base64(token) rank` a line.

    tiktoken's own reader is not used because it caches files by path. Raises ValueError, naming the file, where a line
    has another form, where ranks are not 0, 1, 2, ..., and where one of the 256 bytes has none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(path, _MAX_RANKS_BYTES).splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{printable(path)}, line {number}: expected 'base64 rank', found {line[:60]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{printable(path)}: the {len(ranks)} distinct tokens do not have the ranks 0..{len(ranks) - 1}"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{printable(path)}: {len(missing)} of the 256 single bytes have no rank, the first 0x{missing[0]:02x}"
        )
    return ranks


def read_config(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file `path`. Raises ValueError, naming it, where there is none."""
    return json_reader.parse_object(read_bounded(path, _MAX_CONFIG_BYTES), str(path))


def token_content(value: Any) -> Any:
    """Returns the text of a token, a string or an AddedToken's object in tokenizer_config.json."""
    return value.get("content") if isinstance(value, Mapping) else value


def special_tokens(config: Mapping[str, Any], base: int, path: Path) -> dict[str, int]:
    """Returns content -> id of the 256 slots from `base` on, unnamed ones as `<|reserved_token_{id}|>`.

    Raises ValueError, naming `path` and the field, where a slot or content is not possible, and where a setting would
    change the ids of texts. Warns of unknown keys.
    """
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{printable(path)}: {key} is {printable(config[key], 60)}, expected false or nothing")
    unknown = [key for key in config if key not in _READ | _HARMLESS | {*_REFUSED} and not key.endswith("_token")]
    if unknown:
        warnings.warn(f"{printable(path)}: not read: {printable(', '.join(sorted(unknown)))}", stacklevel=3)
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, Mapping):
        raise ValueError(f"{printable(path)}: added_tokens_decoder is a {type(added).__name__}, expected an object")
    names = {}
    for key, value in added.items():
        name = token_content(value)
        is_slot = key.isascii() and key.isdecimal() and len(key) < 10 and 0 <= int(key) - base < NUM_SPECIAL_SLOTS
        if not is_slot or not isinstance(name, str) or not 0 < len(name) <= _MAX_CONTENT:
            raise ValueError(
                f"{printable(path)}: added_tokens_decoder[{printable(repr(key), 60)}] = {printable(repr(name), 60)}; "
                f"expected an id in {base}..{base + NUM_SPECIAL_SLOTS - 1} and a string of 1 to {_MAX_CONTENT} letters"
            )
        names[int(key)] = name
    ids = range(base, base + NUM_SPECIAL_SLOTS)
    tokens = {names.get(slot, f"<|reserved_token_{slot}|>"): slot for slot in ids}
    if len(tokens) != NUM_SPECIAL_SLOTS or len(names) != len(added):
        raise ValueError(f"{printable(path)}: added_tokens_decoder gives one content to two ids, or one id twice")
    return tokens


def named_ids(config: Mapping[str, Any], special: Mapping[str, int], path: Path) -> dict[str, int | None]:
    """Returns `bos_id`, `eos_id` and `pad_id`, None where the token is null. Raises ValueError for unknown tokens."""
    ids: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = token_content(config.get(f"{kind}_token", f"[{kind.upper()}]"))
        if token is not None and (not isinstance(token, str) or token not in special):
            raise ValueError(
                f"{printable(path)}: {kind}_token is {printable(repr(token), 60)}, which is none of the special tokens"
            )
        ids[f"{kind}_id"] = None if token is None else special[token]
    return ids
