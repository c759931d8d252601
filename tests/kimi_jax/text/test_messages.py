"""The ways in which clients write a conversation, and those that are refused or warned of in one line."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from chat_cases import KIMI_LIKE, answer, call, folder, user

from kimi_jax.text import Tokenizer, chat

SECTION = "<|tool_calls_section_begin|><|tool_call_begin|>{}<|tool_calls_section_end|>"
SHOW_ALL = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


def result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "i", "content": content}


def chain(**reasoning: Any) -> list[dict[str, Any]]:
    return [
        user("a"),
        {"role": "assistant", "content": "", "tool_calls": [call("f", id="i")], **reasoning},
        result("x"),
    ]


@pytest.mark.parametrize(
    "reasoning",
    [
        {"reasoning": "WHY"},
        {"thinking": "WHY"},
        {"reasoning": "WHY", "reasoning_content": "WHY"},
        {"reasoning": "WHY", "reasoning_content": None},
        {"reasoning": "WHY", "reasoning_content": ""},
    ],
)
def test_reasoning_has_three_names(tmp_path: Path, reasoning: dict[str, Any]):
    assert chat.render(chain(**reasoning)) == chat.render(chain(reasoning_content="WHY"))
    assert "<think>WHY</think>" in chat.render(chain(**reasoning))
    for template in (KIMI_LIKE, KIMI_LIKE.replace("reasoning_content", "reasoning")):
        assert "<think>WHY</think>" in chat.render(chain(**reasoning), model=folder(tmp_path, template))


def test_two_reasonings_are_refused():
    message = r"messages\[1\] has reasoning and reasoning_content, which differ"
    with pytest.raises(ValueError, match=message):
        chat.render(chain(reasoning="WHY", reasoning_content="NOT"))
    with pytest.raises(ValueError, match=r"messages\[1\]\.reasoning is dict, expected a string"):
        chat.render(chain(reasoning={"text": "WHY"}))


def test_null_reasoning_is_not_written_as_a_word(tmp_path: Path):
    model = folder(tmp_path, "{{ messages[0].get('reasoning_content', '') }}<|im_end|>")
    assert chat.render([answer("a", None)], model=model) == "<|im_end|>"


@pytest.mark.parametrize("model", ["k2.5", "k2"])
@pytest.mark.parametrize("role", ["system", "developer", "tool", "assistant"])
def test_no_content_is_an_empty_turn(model: str, role: str):
    turn = {"role": role, "tool_call_id": "x"} if role == "tool" else {"role": role}
    without, null, empty = (
        chat.render([user("a"), {**turn, **content}], model=model)
        for content in ({}, {"content": None}, {"content": ""})
    )
    assert without == null == empty


def test_tool_result_without_content_in_full():
    prompt = chat.render([user("a"), result(None)], add_generation_prompt=False)
    assert prompt.endswith("<|im_system|>tool<|im_middle|>## Return of i\n<|im_end|>")


@pytest.mark.parametrize(
    ("function", "written"),
    [({"arguments": None}, "null"), ({}, "{}"), ({"arguments": ""}, ""), ({"arguments": {}}, "{}")],
)
def test_calls_without_arguments(tmp_path: Path, function: dict[str, Any], written: str):
    messages = [user("a"), answer("", None, {"id": "i", "function": {"name": "f", **function}}), result("x")]
    expected = SECTION.format(f"i<|tool_call_argument_begin|>{written}<|tool_call_end|>")
    for model in ("k2.5", "k2", folder(tmp_path, KIMI_LIKE)):
        assert expected in chat.render(messages, model=model)


def test_strings_in_a_list_are_text_parts(tmp_path: Path):
    written = chat.render([user(["a", {"type": "text", "text": "b"}, "c"])])
    assert written == chat.render([user("abc")])
    model = folder(tmp_path, KIMI_LIKE)
    assert chat.render([user(["a", "b"])], model=model) == chat.render([user("ab")], model=model)
    parts = chat.media_parts([user(["a", {"type": "image", "image": "x"}])])
    assert [part.source for part in parts] == ["x"]


def test_unread_keys_are_named_once():
    messages = [
        {**user([{"type": "text", "text": "a", "max_pixels": 4}]), "id": "m", "created": 1, "refusal": None},
        {
            **answer("b", None, {**call("f"), "custom": {}}),
            "partial": True,
            "finish_reason": "stop",
            "annotations": [1],
        },
        {**user("c"), "partial": True},
    ]
    before = copy.deepcopy(messages)
    with pytest.warns(UserWarning) as caught:
        chat.render(messages)
    assert [str(one.message) for one in caught] == [
        "content.max_pixels, partial, tool_calls.custom in messages: not read by the chat template of k2.5"
    ]
    assert messages == before


def test_keys_that_a_folder_reads_are_not_named(tmp_path: Path):
    model = folder(tmp_path, "{{ messages[0].mood }}")
    assert chat.render([{**user("a"), "mood": "good"}], model=model) == "good"
    with pytest.warns(UserWarning, match=r"tone\\n in messages: not read"):
        chat.render([{**user("a"), "tone\n": "good"}], model=model)


@pytest.mark.parametrize("end", ["", "more"])
def test_legacy_calls_are_refused(end: str):
    message = {"role": "assistant", "content": end or None, "function_call": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ValueError, match=r"messages\[1\]\.function_call: .* expected tool_calls"):
        chat.render([user("a"), message])
    assert chat.render([{**answer("b"), "function_call": None}])


def deep(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"x": value}}
    return value


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "search", "parameters": parameters}}


LOOP: list[Any] = []
LOOP.append(LOOP)
HALF = "a\ud83d"


@pytest.mark.parametrize("model", ["k2.5", "k2", "folder"])
@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([user("a")], [tool(deep(245))], r"tools\[0\] \(search\) nests deeper than 64 levels"),
        ([user("a")], [tool(json.loads('{"a":' * 400 + "1" + "}" * 400))], r"tools\[0\] \(search\) nests deeper"),
        ([user("a")], [tool({"default": LOOP})], r"tools\[0\] \(search\) nests deeper"),
        ([user("a")], [tool({"maximum": float("nan")})], r"tools\[0\] \(search\) holds the number nan"),
        ([user("a")], [tool({"maximum": 10**5000})], r"tools\[0\] \(search\) holds an integer of more than 400 digits"),
        ([user("a")], [tool({3: 1})], r"tools\[0\] \(search\) holds the key 3, expected a string"),
        ([user("a")], [tool({"enum": {1}})], r"tools\[0\] \(search\) holds a set, which is not JSON"),
        ([user("a")], [tool({"title": HALF})], r"tools\[0\] \(search\) holds half of a surrogate pair \(\\ud83d\)"),
        ([user("a"), user(HALF)], None, r"messages\[1\] holds half of a surrogate pair"),
        ([user([HALF])], None, r"messages\[0\].content\[0\] holds half of a surrogate pair"),
        ([user("a"), answer("b", HALF)], None, r"messages\[1\] holds half of a surrogate pair"),
        ([answer("b", None, call("f", {HALF: 1}))], None, r"messages\[0\] holds half of a surrogate pair"),
        ([answer("b", None, call("f", {"a": deep(70)}))], None, r"messages\[0\] nests deeper than 64 levels"),
        ([{**user("a"), "mood": deep(500)}], None, r"messages\[0\] nests deeper than 64 levels"),
        ([{"role": "user\x1b[31m", "content": ""}], None, r"messages\[0\]\.role is 'user\\x1b\[31m', expected"),
        ([{"role": ["user"], "content": ""}], None, r"messages\[0\]\.role is list, expected"),
    ],
)  # fmt: skip
def test_what_no_prompt_can_hold(tok: Tokenizer, tmp_path: Path, model: str, messages: Any, tools: Any, message: str):
    place = folder(tmp_path, KIMI_LIKE) if model == "folder" else model
    for write in (chat.render, lambda *what, **more: chat.encode(tok, *what, **more)):
        with pytest.raises(ValueError, match=message) as refused:
            write(messages, tools, model=place)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_media_may_be_anything(tmp_path: Path):
    parts = [{"type": "image", "image": object()}, {"type": "video", "video": [b"x"]}, {"type": "image", "url": HALF}]
    prompt = chat.render([user(parts)])
    assert prompt.count("<|media_pad|>") == 2 and prompt.count("<|kimi_k25_video_placeholder|>") == 1
    assert chat.render([user(parts[:1])], model=folder(tmp_path, KIMI_LIKE)) == chat.render([user(parts[:1])])


def test_a_tool_without_its_function_is_named():
    with pytest.warns(UserWarning, match=r"tools\[1\] has no function object, so it is not declared"):
        prompt = chat.render([user("a")], [tool({}), {"type": "function", "name": "flat", "parameters": {}}])
    assert "type search" in prompt


def test_ordinary_answers_come_back_without_a_warning():
    message = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    message |= {"function_call": None, "tool_calls": [call("f", id="i", index=0)], "reasoning": "r", "id": "chatcmpl-1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<think>r</think>" in chat.render([user("a"), message, result("x")])
