"""Grammars of calls and contents, compiled by llguidance: what they take, and that random tokens end in valid JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import answer_cases as ac
import jsonschema
import numpy as np
import pytest
from answer_cases import call, section, spell
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.grammar import choice_rule, content_rule, next_number, pattern_rule, write_grammar

IM_END = 514


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def guidance(tok: Tokenizer) -> LLTokenizer:
    return lltokenizer_from_encoding(tok.encoding, n_vocab=tok.vocab_size, eos_token=[IM_END])


def tool(name: str, schema: Any = None, strict: bool | None = True) -> dict[str, Any]:
    function = {"name": name, "parameters": schema, "strict": strict}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def matcher(guidance: LLTokenizer, grammar: str) -> LLMatcher:
    found = LLMatcher(guidance, grammar, log_level=0)
    assert not found.is_error(), f"{found.get_error()}\n{grammar}"
    return found


def takes(guidance: LLTokenizer, tok: Tokenizer, grammar: str | None, raw: str) -> bool:
    """Says whether an answer, with markers spelt out, is one of the grammar."""
    ids = spell(tok, raw)
    found = matcher(guidance, grammar or "")
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


def allowed(found: LLMatcher) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(found.compute_bitmask(), np.uint8), bitorder="little"))


def walk(guidance: LLTokenizer, grammar: str, seed: int, limit: int = 400) -> tuple[list[int], str]:
    """Returns the tokens that a model of random weights answers, and why it ended."""
    found, random = matcher(guidance, grammar), np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < limit and not found.is_stopped():
        ids.append(int(random.choice(allowed(found))))
        assert found.consume_token(ids[-1]), found.get_error()
    return ids, "stop" if found.is_stopped() else "length"


def check_walk(guidance: LLTokenizer, tok: Tokenizer, schema: Any, seed: int) -> bool:
    """Says whether a forced call ends by itself; then its arguments are valid."""
    ids, finish = walk(guidance, write_grammar(tok, [tool("f", schema)], "required", parallel=False, number=7), seed)
    parsed = chat.parse(tok, ids, thinking=False, finish=finish)
    assert parsed.content is None and parsed.finish_reason == ("tool_calls" if finish == "stop" else "length")
    if finish == "stop":
        (found,) = parsed.tool_calls
        assert (found["id"], found["function"]["name"]) == ("functions.f:7", "f")
        jsonschema.Draft202012Validator(schema).validate(json.loads(found["function"]["arguments"]))
    return finish == "stop"


OBJECTS = [
    {"type": "object"},
    {"properties": {"a": {"type": "boolean"}, "$id": {"type": "null"}}, "required": ["a", "$id"], "$id": "no URI"},
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["left", "right", 3, None]},
            "text": {"type": "string", "maxLength": 8},
            "tags": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        },
        "required": ["kind", "tags"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {}]}}}},
    },
]


@pytest.mark.parametrize("schema", OBJECTS)
def test_random_tokens_call_with_valid_arguments(guidance, tok, schema):
    assert sum(check_walk(guidance, tok, schema, seed) for seed in range(10)) >= 5


@pytest.mark.slow
def test_every_schema_of_the_vendor_s_suites_compiles_and_gives_valid_arguments(guidance, tok, real_tokenizer_dir):
    files = sorted((real_tokenizer_dir.parent / "mfjs").glob("*/valid.jsonl"))
    schemas = [wrap(json.loads(line)) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    runnable = [schema for schema in schemas if "999999999999" not in json.dumps(schema)]  # a string of that length
    assert len(runnable) >= 211 if files else pytest.skip("the schemas do not lie beside the real tokenizer's folder")
    ended = sum(check_walk(guidance, tok, schema, seed) for schema in runnable for seed in range(2))
    assert ended >= 1.4 * len(runnable)


def wrap(schema: Any) -> dict[str, Any]:
    """Returns a schema as the verifier sends it: one property of an object, what is global at its root."""
    inner = without(schema, "default")
    whole: dict[str, Any] = {"type": "object", "required": ["value"], "additionalProperties": False}
    if isinstance(inner, dict):
        whole |= {key: inner.pop(key) for key in ("$defs", "$id") if key in inner}
    if '"$ref": "#"' in json.dumps(inner):
        inner = json.loads(json.dumps(inner).replace('"$ref": "#"', '"$ref": "#/$defs/whole"'))
        whole["$defs"] = whole.get("$defs", {}) | {"whole": inner}
    return whole | {"properties": {"value": inner}}


def without(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [without(one, key) for one in value]
    if isinstance(value, dict):
        return {name: without(one, key) for name, one in value.items() if name != key}
    return value


A, B = (
    tool("a", {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False}),
    tool("b.c"),
)
CALL_A, CALL_B = call("functions.a:0", '{"x":1}'), call("functions.b.c:1", "{}")
JSON = content_rule({"type": "json_object"})
FORCED_B = {"type": "function", "function": {"name": "b.c"}}


@pytest.mark.parametrize(
    ("options", "taken", "refused"),
    [
        ({}, ["", "Six.\n", section(CALL_A), "Look." + section(CALL_A, CALL_B)], [section(), section(CALL_A) + "so"]),
        ({"tool_choice": "auto", "parallel": False}, ["Six.", section(CALL_A)], [section(CALL_A, CALL_B)]),
        ({"tool_choice": "none"}, ["Six.", ""], [section(CALL_A)]),
        ({"tool_choice": "required"}, [section(CALL_A), section(CALL_A, CALL_B)], ["", "So." + section(CALL_A)]),
        ({"tool_choice": "required", "number": 1}, [section(CALL_B)], [section(CALL_A)]),
        ({"tool_choice": FORCED_B, "number": 1}, [section(CALL_B)], [section(call("functions.a:1"))]),
        ({"content": JSON}, ['{"y":[1,{}]}', section(CALL_A)], ["Six.", "[]", "{}" + section(CALL_A)]),
        ({"content": JSON, "tool_choice": "none"}, ["{}"], ["", section(CALL_A)]),
        ({"content": choice_rule(["left", 'é"\n'])}, ["left", 'é"\n'], ["", "right", "leftleft"]),
        ({"content": pattern_rule("[a-c]+/\\d{2}\n")}, ["ab/12\n"], ["ab/123", "d/12\n"]),
    ],
)  # fmt: skip
def test_a_grammar_takes_what_the_request_asks_for(guidance, tok, options, taken, refused):
    grammar = write_grammar(tok, [A, B], **options)
    assert [raw for raw in taken if not takes(guidance, tok, grammar, raw)] == []
    assert [raw for raw in refused if takes(guidance, tok, grammar, raw)] == []


def test_arguments_keep_their_schema_where_it_is_strict(guidance, tok):
    schema = A["function"]["parameters"]
    for strict, arguments, taken in [(True, '{"x":1}', True), (True, '{"y":1}', False), (None, '{"y":1}', True)]:
        for blanks in ("", " "):
            grammar = write_grammar(tok, [tool("a", schema, strict)], "required")
            raw = section(call("functions.a:0", arguments.replace(":", ":" + blanks)))
            assert takes(guidance, tok, grammar, raw) == (taken and not blanks)
    assert not takes(guidance, tok, write_grammar(tok, [tool("a")], "required"), section(call("functions.a:0", "[]")))


def test_no_string_holds_a_special_token(guidance, tok):
    ids = spell(tok, section(call("functions.b.c:0", '{"x":"')).split(ac.END_CALL)[0])
    found = matcher(guidance, write_grammar(tok, [B], "required"))
    assert found.consume_tokens(ids)
    inside = allowed(found)
    assert len(inside) > 350 and not set(inside.tolist()) & set(tok.special_tokens.values())


def test_what_is_forced_is_known_before_the_model_says_it(guidance, tok):
    found = matcher(guidance, write_grammar(tok, [B], "required", number=3))
    forced = found.compute_ff_tokens()
    assert tok.decode(forced).startswith(f"{ac.SECTION}{ac.CALL}functions.b.c:")


@pytest.mark.parametrize("name", ['a"b\\c', "é北", "a:1", "x'/", "a b", "%json {}", "<[514]>", ac.END_CALL, "|", "\t"])
def test_any_name_of_one_line_is_taken_and_parsed_back(guidance, tok, name):
    grammar = write_grammar(tok, [A, tool(name)], "required")
    ids = [*spell(tok, ac.SECTION + ac.CALL), *tok.encode(f"functions.{name}:0", allow_special=False)]
    ids += spell(tok, ac.ARGUMENTS + "{}" + ac.END_CALL + ac.END_SECTION)
    found = matcher(guidance, grammar)
    assert found.try_consume_tokens(ids) == len(ids) and found.is_accepting()
    assert chat.parse(tok, ids, thinking=False).tool_calls[0]["function"]["name"] == name


def test_response_formats(guidance, tok):
    def form(**fields):
        return {"type": "json_schema", "json_schema": {"name": "n", "schema": A["function"]["parameters"]} | fields}

    assert content_rule(None) is None and content_rule({"type": "text"}) is None
    assert write_grammar(tok) is None and write_grammar(tok, [], "none") is None
    for fields, strict in (({}, True), ({"strict": True}, True), ({"strict": False}, False)):
        grammar = write_grammar(tok, content=content_rule(form(**fields)))
        assert takes(guidance, tok, grammar, '{"x":1}')
        assert takes(guidance, tok, grammar, '{"y":"é"}') == (not strict)


def test_a_conversation_s_next_number():
    def said(*ids: str | None) -> Iterator[dict[str, Any]]:
        yield {"role": "user", "content": ""}
        yield {"role": "assistant", "tool_calls": [{"id": one} for one in ids]}

    assert next_number([*said()]) == 0 and next_number([{"role": "assistant", "tool_calls": None}]) == 0
    assert next_number([*said("functions.a:0", "functions.b:1"), *said("call_x", None)]) == 4
    assert next_number([*said("functions.a:9", "a:9999999", "0")]) == 10


NO_TOOLS = ("tool_choice is 'required', which needs tools", {"tool_choice": "required"})


@pytest.mark.parametrize(
    ("message", "options"),
    [
        NO_TOOLS,
        (NO_TOOLS[0], {"tool_choice": "required", "tools": []}),
        ("tool_choice is 'always', expected auto, none, required, or", {"tools": [A], "tool_choice": "always"}),
        ("tool_choice is of type dict, expected", {"tools": [A], "tool_choice": {"type": "function"}}),
        ("tool_choice names 'b.c', which is none of the tools", {"tools": [A], "tool_choice": FORCED_B}),
        (r"tools\[1\]\.function\.name is 'a', which an earlier tool has", {"tools": [A, A]}),
        (r"tools\[0\]\.function\.name is None, expected a text", {"tools": [{"function": {}}]}),
        (r"tools\[0\]\.function\.name is 'a\\nb', expected a name in one line", {"tools": [tool("a\nb")]}),
        (r"tools\[0\]\.function\.strict is 'yes', expected a boolean", {"tools": [tool("a", strict="yes")]}),
        (r"tools\[0\]\.function\.parameters is of type list, expected an object", {"tools": [tool("a", [1])]}),
        (r"tools\[0\]\.function is None, expected an object", {"tools": [{"type": "search"}]}),
        ("tools has 129 tools, expected at most 128", {"tools": [tool(str(i)) for i in range(129)]}),
    ],
)
def test_what_is_wrong_with_a_request_is_named(tok, message, options):
    with pytest.raises(ValueError, match=message):
        write_grammar(tok, **options)


@pytest.mark.parametrize(
    ("message", "form"),
    [
        ("response_format is 'json', expected an object", "json"),
        ("response_format.type is 'xml', expected text, json_object or json_schema", {"type": "xml"}),
        ("response_format.json_schema is None, expected an object", {"type": "json_schema"}),
        (r"json_schema\.name is None", {"type": "json_schema", "json_schema": {"schema": {}}}),
        (r"json_schema\.schema is None", {"type": "json_schema", "json_schema": {"name": "n"}}),
        (r"json_schema\.schema is of type list", {"type": "json_schema", "json_schema": {"name": "n", "schema": []}}),
        (
            r"json_schema\.strict is of type int, expected a boolean",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}},
        ),
    ],
)
def test_what_is_wrong_with_a_response_format_is_named(message, form):
    with pytest.raises(ValueError, match=message):
        content_rule(form)


def test_choices_and_patterns_that_are_none():
    for wrong, message in (([], "choice is of type list, expected"), (["a", ""], r"choice\[1\] is ''")):
        with pytest.raises(ValueError, match=message):
            choice_rule(wrong)
    for wrong, message in (("", "regex is ''"), ("a\\", "regex ends in a single backslash")):
        with pytest.raises(ValueError, match=message):
            pattern_rule(wrong)
    assert pattern_rule("a\\\\") == "/a\\\\/" and pattern_rule("\\/\\\n") == "/\\/\\n/"
