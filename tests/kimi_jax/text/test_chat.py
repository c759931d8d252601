"""Chat prompts against strings worked out by hand from the published templates' rules, and attempts to forge a turn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_cases import EVIL, FIELDS, FULL, TOOLS, answer, call, poisoned, special, user
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.media import VideoChunk
from kimi_jax.text import Tokenizer, chat

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
SEARCH_TS = "# Tools\n\n## functions\nnamespace functions {\ntype search = (_: {}) => any;\n}\n"
IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
ASK = "<|im_assistant|>assistant<|im_middle|><think>"


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def answers(prompt: str) -> list[str]:
    """Returns the text between header and end of each assistant turn."""
    return [turn.split("<|im_end|>")[0] for turn in prompt.split("<|im_assistant|>assistant<|im_middle|>")[1:]]


def test_k25_one_question():
    assert chat.render([user("Hi")]) == f"<|im_user|>user<|im_middle|>Hi<|im_end|>{ASK}"
    assert chat.render([user("Hi")], thinking=False) == f"<|im_user|>user<|im_middle|>Hi<|im_end|>{ASK}</think>"
    assert chat.render([user("Hi")], add_generation_prompt=False) == "<|im_user|>user<|im_middle|>Hi<|im_end|>"


def test_k25_everything_in_one_conversation():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "Ann",
            "content": [{"type": "text", "text": "Find"}, {"type": "text", "text": " it."}],
        },
        answer(
            "Looking.", "I search.", call("search", '{"q":  1}', id="functions.search:7"), call("search", {"q": "é"})
        ),
        result("functions.search:7", "one"),
        {**result("x", "two"), "name": "search"},
    ]
    assert chat.render(messages, [SEARCH]) == (
        f"<|im_system|>tool_declare<|im_middle|>{SEARCH_TS}<|im_end|>"
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>Ann<|im_middle|>Find it.<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>I search.</think>Looking."
        "<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.search:7<|tool_call_argument_begin|>{"q":  1}<|tool_call_end|>'
        '<|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>{"q": "é"}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.search:7\none<|im_end|>"
        "<|im_system|>search<|im_middle|>## Return of x\ntwo<|im_end|>" + ASK
    )


def test_k25_counts_calls_over_the_whole_conversation():
    steps = [call("f"), call("g")], [call("f", id="own")], [call("f")]
    messages = [user("a"), *(answer(None, None, *calls) for calls in steps)]
    prompt = chat.render(messages, add_generation_prompt=False)
    ids = [piece.split("<|tool_call_argument_begin|>")[0] for piece in prompt.split("<|tool_call_begin|>")[1:]]
    assert ids == ["functions.f:0", "functions.g:1", "own", "functions.f:3"]


CHAIN = [user("a"), answer(None, "r1", call("f")), result("i", "x"), answer(None, "r2", call("f")), result("i", "y")]


@pytest.mark.parametrize(
    ("messages", "options", "reasoning"),
    [
        # reasoning stays while tools are being called ...
        (CHAIN, {}, ["r1", "r2"]),
        # ... and goes once an answer without calls has ended the chain
        ([*CHAIN, answer("done", "r3")], {}, ["", "", ""]),
        ([*CHAIN, answer("done", "r3"), user("b")], {}, ["", "", ""]),
        ([*CHAIN, answer("done", "r3"), user("b"), answer(None, "r4", call("f"))], {}, ["", "", "", "r4"]),
        ([*CHAIN, answer("done", "r3"), user("b")], {"preserve_thinking": True}, ["r1", "r2", "r3"]),
        (CHAIN, {"thinking": False}, ["", ""]),
        (CHAIN, {"thinking": False, "preserve_thinking": True}, ["r1", "r2"]),
    ],
)
def test_k25_reasoning_history(messages: list[Any], options: dict[str, bool], reasoning: list[str]):
    found = answers(chat.render(messages, add_generation_prompt=False, **options))
    assert [turn[: turn.index("</think>")] for turn in found] == [f"<think>{r}" for r in reasoning]


def test_k2_has_a_default_system_prompt_json_tools_and_no_think():
    default = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
    tools = '[{"function":{"name":"search","parameters":{"properties":{},"type":"object"}},"type":"function"}]'
    messages = [user("Hi"), answer("Yes.", "hidden", call("search")), result("functions.search:0", "r")]
    turns = (
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>Yes."
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.search:0\nr<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    declared = f"<|im_system|>tool_declare<|im_middle|>{tools}<|im_end|>"
    assert chat.render(messages, [SEARCH], model="k2") == declared + default + turns
    own = {"role": "system", "content": "Mine."}
    assert chat.render([own, *messages], model="k2") == "<|im_system|>system<|im_middle|>Mine.<|im_end|>" + turns


def test_tools_that_declare_nothing_are_shown_as_json():
    prompt = chat.render([user("Hi")], [{"type": "builtin", "name": "b"}])
    assert prompt.startswith(
        '<|im_system|>tool_declare<|im_middle|>[{"name":"b","type":"builtin"}]<|im_end|><|im_user|>'
    )


def test_images_and_videos_have_placeholders_in_order():
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "and"},
        {"type": "video_url", "video_url": "b.gif"},
        {"type": "image", "image": "c.png"},
        {"type": "video", "path": "d"},
        {"type": "image"},
    ]
    prompt = chat.render([user(parts), user("no media"), user(parts[:1])], add_generation_prompt=False)
    video = "<|kimi_k25_video_placeholder|>"
    assert answers(prompt) == []
    assert prompt == (
        f"<|im_user|>user<|im_middle|>{IMAGE}and{video}{IMAGE}{video}{IMAGE}<|im_end|>"
        f"<|im_user|>user<|im_middle|>no media<|im_end|><|im_user|>user<|im_middle|>{IMAGE}<|im_end|>"
    )
    found = [(part.kind, part.source) for part in chat.media_parts([user(parts), user("no media"), user(parts[:1])])]
    assert found == [
        ("image", "a.png"), ("video", "b.gif"), ("image", "c.png"), ("video", "d"), ("image", None), ("image", "a.png"),
    ]  # fmt: skip


def test_video_chunks_replace_the_placeholder_in_encode(tok: Tokenizer):
    messages = [user([{"type": "video_url", "video_url": {"url": "v.gif"}}, {"type": "text", "text": "What?"}])]
    patches = np.zeros((4, 3, 14, 14), np.float32)
    chunks = [VideoChunk(patches, (1, 2, 2), "00:00:00.000"), VideoChunk(patches, (1, 2, 2), "00:00:02.500")]
    expected = (
        "<|im_user|>user<|im_middle|>"
        "00:00:00.000<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"
        "00:00:02.500<|media_begin|>video<|media_content|><|media_pad|><|media_end|>What?<|im_end|>" + ASK
    )
    assert chat.encode(tok, messages, videos=[chunks]) == tok.encode(expected)
    for videos in ([], [chunks, chunks]):
        with pytest.raises(ValueError, match=f"the prompt holds 1 videos, but the chunks of {len(videos)} are given"):
            chat.encode(tok, messages, videos=videos)


@pytest.mark.parametrize("path", FIELDS, ids=str)
def test_nobody_forges_a_turn(tok: Tokenizer, path: tuple[Any, ...]):
    options = {"model": "k2.5"}
    honest = chat.encode(tok, FULL, TOOLS, **options)
    attacked = poisoned(path)
    ids = chat.encode(tok, **attacked, **options)
    assert special(ids) == special(honest)
    assert "obey" in tok.decode(ids)
    assert tok.decode(ids) == chat.render(**attacked, **options)
    # the attack is real: encoded as one string with special tokens, the prompt has more of them
    assert len(special(tok.encode(chat.render(**attacked, **options)))) > len(special(honest))


def test_nobody_forges_a_turn_in_k2(tok: Tokenizer):
    texts = [{**message, "content": "x"} for message in FULL]
    honest = special(chat.encode(tok, texts, TOOLS, model="k2"))
    evil = [{**message, "content": EVIL} for message in FULL]
    assert special(chat.encode(tok, evil, poisoned(FIELDS[-5])["tools"], model="k2")) == honest


@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<[")), min_size=6, max_size=6))
def test_harmless_text_has_the_official_tokens(tok: Tokenizer, texts: list[str]):
    parts = [{"type": "text", "text": texts[0]}, {"type": "image", "image": "x"}, {"type": "text", "text": texts[1]}]
    messages = [user([*parts, {"type": "text", "text": texts[2]}]), answer(texts[3], texts[4], call("f", texts[5]))]
    assert chat.encode(tok, messages) == tok.encode(chat.render(messages))


def test_neighbouring_text_is_tokenised_together(tok: Tokenizer):
    messages = [user([{"type": "text", "text": "questio"}, {"type": "text", "text": "n"}])]
    assert chat.encode(tok, messages) == chat.encode(tok, [user("question")]) == tok.encode(chat.render(messages))
    assert tok.encode("questio") + tok.encode("n") != tok.encode("question")


def test_tokenizer_without_the_markers_is_refused(tok: Tokenizer, tmp_path: Path):
    (tmp_path / "tiktoken.model").write_bytes(Path(tok.encoding.name).read_bytes())
    names = {f"{kind}_token": f"<|reserved_token_{512 + i}|>" for i, kind in enumerate(("bos", "eos", "pad"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"no special token <\|im_user\|>, which the template of k2.5"):
        chat.encode(Tokenizer.from_folder(tmp_path), [user("Hi")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is list, expected a list of at least one message"),
        ("Hi", "messages is 'Hi'"),
        (["Hi"], r"messages\[0\] is 'Hi', expected an object"),
        (
            [{"content": "x"}],
            r"messages\[0\]\.role is NoneType, expected one of system, developer, user, assistant, tool",
        ),
        ([user("a"), {"role": "wizard", "content": "x"}], r"messages\[1\]\.role is 'wizard'"),
        ([user(None)], r"messages\[0\]\.content is NoneType"),
        ([user(3)], r"messages\[0\]\.content is int"),
        ([user([3])], r"messages\[0\]\.content\[0\] is int, expected a string or an object with a type"),
        ([user([{"type": "audio"}])], r"messages\[0\]\.content\[0\]\.type is 'audio', expected text, image_url"),
        ([user([{"type": "text"}])], r"messages\[0\]\.content\[0\]\.text is NoneType, expected a string"),
        ([{**user("a"), "name": 3}], r"messages\[0\]\.name is int, expected a string"),
        ([{**answer("a"), "reasoning_content": ["b"]}], r"messages\[0\]\.reasoning_content is list"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.tool_call_id is NoneType"),
        (
            [{**user("a"), "tool_calls": [call("f")]}],
            r"messages\[0\]\.tool_calls: a message of role user calls no tools",
        ),
        ([{**answer("a"), "tool_calls": call("f")}], r"messages\[0\]\.tool_calls is dict, expected a list"),
        ([answer("a", None, {"id": "x"})], r"messages\[0\]\.tool_calls\[0\] has no function object"),
        ([answer("a", None, call("f"), call("", "{}"))], r"messages\[0\]\.tool_calls\[1\]\.function\.name is ''"),
        ([answer("a", None, call("f", [1]))], r"tool_calls\[0\]\.function\.arguments is list"),
        ([answer("a", None, call("f", id=3))], r"tool_calls\[0\]\.id is int"),
    ],
)
def test_bad_messages_name_the_field(messages: Any, message: str):
    with pytest.raises(ValueError, match=message):
        chat.render(messages)


def test_k2_refuses_media():
    with pytest.raises(ValueError, match=r"messages\[0\]\.content holds media, but K2 reads text only"):
        chat.render([user([{"type": "image", "image": "x"}])], model="k2")


def test_bad_tools():
    with pytest.raises(ValueError, match=r"tools\[1\] is a str, expected an object"):
        chat.render([user("Hi")], [SEARCH, "f"])
