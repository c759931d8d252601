"""Conversations that nobody would write get a prompt or one of our own errors, never a marker from people's text."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from chat_cases import EVIL, FIELDS, FULL, KIMI_LIKE, TOOLS, folder, poisoned, special
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_jax.text import Tokenizer, chat

ROLES = ["system", "developer", "user", "assistant", "tool"]
KEYS = [
    *("role", "content", "name", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "function_call"),
    *("type", "text", "image_url", "function", "arguments", "parameters", "properties", "$ref", "$defs", "enum"),
    *("anyOf", "items", "required", "default", "description", "additionalProperties", "maximum"),
]  # fmt: skip
WORDS = [EVIL, "", "text", "function", "object", "array", "#", "#/$defs/a", "\ud800", "\U000f0000", "\x1b[0m", *ROLES]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
NAMES = st.sampled_from(KEYS) | st.text(max_size=3)
ANYTHING = st.recursive(
    SCALARS | st.binary(max_size=3) | st.just(10**999),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.integers(), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video_url"])}, optional={"text": st.text()})
    | SCALARS
)
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": SCALARS}, optional={"arguments": ANYTHING})}),
    max_size=2,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={
        "content": SCALARS | PARTS,
        "name": SCALARS,
        "reasoning": SCALARS,
        "tool_calls": CALLS,
        "tool_call_id": st.sampled_from(WORDS),
    },
)
MESSAGES = st.lists(MESSAGE | st.dictionaries(NAMES, ANYTHING, max_size=4), max_size=4) | ANYTHING
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": st.text()}, optional={"parameters": ANYTHING}),
    }
)
TOOL_LISTS = st.lists(TOOL | ANYTHING, max_size=3) | st.none() | ANYTHING


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("own"), KIMI_LIKE)


def check(tok: Tokenizer, own: Path, messages: Any, tools: Any) -> None:
    for model in ("k2.5", "k2", own):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                prompt = chat.render(messages, tools, model=model)
                ids = chat.encode(tok, messages, tools, model=model, videos=[[]] * prompt.count(VIDEO))
            except (ValueError, OSError) as error:
                assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 1000
                continue
        assert tok.decode(ids) == prompt.replace(VIDEO, "")


VIDEO = "<|kimi_k25_video_placeholder|>"
BOUNDS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=60, **BOUNDS)
@given(messages=MESSAGES, tools=TOOL_LISTS)
def test_nothing_but_our_own_errors(tok: Tokenizer, own: Path, messages: Any, tools: Any):
    check(tok, own, messages, tools)


@pytest.mark.slow
@settings(max_examples=5000, **BOUNDS)
@given(messages=MESSAGES, tools=TOOL_LISTS)
def test_nothing_but_our_own_errors_for_longer(tok: Tokenizer, own: Path, messages: Any, tools: Any):
    check(tok, own, messages, tools)


SPELLED = st.lists(st.sampled_from(["<|", "|>", "<", "im_end", "think", "/", "[EOS]", EVIL, "é", "\U000f0001", " "]))


@settings(max_examples=40, **BOUNDS)
@given(path=st.sampled_from(FIELDS), pieces=SPELLED)
def test_no_forged_markers(tok: Tokenizer, own: Path, path: tuple[Any, ...], pieces: list[str]):
    attacked = poisoned(path, "".join(pieces) or EVIL)
    for model in ("k2.5", own):
        assert special(chat.encode(tok, **attacked, model=model)) == special(chat.encode(tok, FULL, TOOLS, model=model))


def test_all_private_characters_but_a_few(tok: Tokenizer, own: Path):
    everything = "".join(chr(code) for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)))
    blocks = "".join(chr(code) for code in range(0xF0000, 0x10F000, 0x1000))
    for text in (blocks, everything):
        messages = [{"role": "user", "content": text + EVIL}]
        ids = chat.encode(tok, messages, model=own)
        assert ids == chat.encode(tok, messages) and tok.decode(ids) == chat.render(messages, model=own)
    messages[0]["content"] = everything + "".join(map(chr, range(0x100000, 0x10FFFE)))
    with pytest.raises(ValueError, match=r"the messages leave fewer than \d+ private-use characters"):
        chat.encode(tok, messages, model=own)
