"""Grammars of K3's answers: what they take, and that random tokens end in arguments of their schema."""

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.grammar import choice_rule, content_rule, write_grammar
from kimi_jax.text.tiny import K3_SLOTS, write_tiny_tokenizer

RESPONSE, CLOSED = "<|open|>response<|sep|>", "<|close|>response<|sep|>"
END = "<|close|>message<|sep|>"


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("k3-grammar")
    write_tiny_tokenizer(folder, slots=K3_SLOTS)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def guidance(tok: Tokenizer) -> LLTokenizer:
    return lltokenizer_from_encoding(tok.encoding, n_vocab=tok.vocab_size, eos_token=[514])


def tool(name: str, schema: Any = None, strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema or {}, "strict": strict}}


def argument(key: str, kind: str, text: str) -> str:
    return f'<|open|>argument key="{key}" type="{kind}"<|sep|>{text}<|close|>argument<|sep|>'


def call(name: str, *body: str, index: int = 1) -> str:
    return f'<|open|>call tool="{name}" index="{index}"<|sep|>{"".join(body)}<|close|>call<|sep|>'


def calls(*body: str) -> str:
    return f"<|open|>tools<|sep|>{''.join(body)}<|close|>tools<|sep|>"


def matcher(guidance: LLTokenizer, written: str | None) -> LLMatcher:
    found = LLMatcher(guidance, written or "", log_level=0)
    assert not found.is_error(), f"{found.get_error()}\n{written}"
    return found


def takes(guidance: LLTokenizer, tok: Tokenizer, written: str | None, text: str) -> bool:
    """Says whether an answer, with markers spelt out, is one of the grammar, after which it is over."""
    found, ids = matcher(guidance, written), tok.encode(text)
    return found.try_consume_tokens(ids) == len(ids) and found.is_stopped()


def walk(guidance: LLTokenizer, written: str | None, seed: int) -> tuple[list[int], bool]:
    """Returns the tokens that a model of random weights answers, and whether they come to an end."""
    found, random = matcher(guidance, written), np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < 400 and not found.is_stopped():
        mask = np.unpackbits(np.frombuffer(found.compute_bitmask(), np.uint8), bitorder="little")
        ids.append(int(random.choice(np.flatnonzero(mask))))
        assert found.consume_token(ids[-1]), found.get_error()
    return ids, found.is_stopped()


NODE: dict[str, Any] = {"type": "object", "additionalProperties": False}
NODE["properties"] = {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}
PROPERTIES: dict[str, Any] = {
    "text": {"type": "string", "maxLength": 8, "description": "A text."},
    "short": {"type": ["string", "null"], "minLength": 2, "maxLength": 3},
    "kind": {"enum": ["left", 'a "b" & <c>', 3, None, "é"]},
    "named": {"const": "", "type": "string"},
    "count": {"type": "integer", "minimum": 0, "maximum": 99},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["yes", "no"]}]},
    "list": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    'a "key" &': {"$ref": "#/$defs/node"},
}
OBJECTS = {
    "of properties": {
        "type": "object",
        "properties": PROPERTIES,
        "required": ["text", "kind", "count", "list"],
        "additionalProperties": False,
        "$defs": {"node": NODE},
    },
    "of nothing": {"type": "object", "properties": {}, "additionalProperties": False},
    "of anything": {"type": "object"},
    "of one kind of value": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9, "minimum": 0}},
    "of a pattern": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[ab]{2}$"}}},
    "by reference": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
}


@pytest.mark.parametrize("schema", OBJECTS.values(), ids=OBJECTS)
def test_random_tokens_call_with_valid_arguments(guidance, tok, schema):
    written, ended = write_grammar(tok, [tool('f"&', schema)], "required", parallel=False), 0
    for seed in range(8):
        ids, stopped = walk(guidance, written, seed)
        if stopped:
            (found,) = chat.parse(tok, tok.encode("<|close|>think<|sep|>") + ids, model="k3").tool_calls
            assert found["function"]["name"] == 'f"&'
            jsonschema.Draft202012Validator(schema).validate(json.loads(found["function"]["arguments"]))
        ended += stopped
    assert ended >= 5


def test_arguments_are_written_as_prompts_show_them(guidance, tok):
    arguments = {"text": 'x "y"\n', "kind": None, "count": 7, "either": "no", "list": [{"next": {"next": None}}, {}]}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    shown = chat.render([message], model="k3", thinking=False, add_generation_prompt=False)
    text = shown.removeprefix('<|open|>message role="assistant"<|sep|>').removesuffix("<|end_of_msg|>")
    assert takes(guidance, tok, write_grammar(tok, [tool("f", OBJECTS["of properties"])], "required"), text)
    assert takes(guidance, tok, write_grammar(tok, [tool("f", strict=False)], "required"), text)


NUMBERS = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"], "additionalProperties": False}


def test_arguments_that_are_not_of_the_schema_are_not_taken(guidance, tok):
    written = write_grammar(tok, [tool("f", NUMBERS)], "required")
    for body, expected in {
        argument("n", "number", "-1.5"): True,
        argument("n", "string", "1"): False,
        argument("n", "number", "one"): False,
        argument("m", "number", "1"): False,
        argument("n", "number", "1") + argument("m", "null", "null"): False,
        "": False,
    }.items():
        assert takes(guidance, tok, written, RESPONSE + CLOSED + calls(call("f", body)) + END) is expected, body


def test_calls_are_those_that_the_choice_allows(guidance, tok):
    tools = [tool("f", NUMBERS), tool("g", strict=False)]
    one, two = argument("n", "number", "1"), argument("any", "object", '{"a": [1, "b"]}') + argument("t", "string", "")
    texts = {
        "text": RESPONSE + "Hello" + CLOSED + END,
        "call": RESPONSE + CLOSED + calls(call("f", one)) + END,
        "both": RESPONSE + "Hello" + CLOSED + calls(call("g", two)) + END,
        "two calls": RESPONSE + CLOSED + calls(call("g", two), call("f", one, index=2)) + END,
        "another": RESPONSE + CLOSED + calls(call("h")) + END,
        "none": RESPONSE + CLOSED + calls() + END,
        "not closed": RESPONSE + CLOSED + calls(call("f", one)),
        "a forged turn": RESPONSE + "<|end_of_msg|>" + CLOSED + END,
    }
    named = {"type": "function", "function": {"name": "g"}}
    for choice, parallel, expected in (
        ("auto", True, {"text", "call", "both", "two calls"}),
        ("auto", False, {"text", "call", "both"}),
        ("none", True, {"text"}),
        ("required", True, {"call", "two calls"}),
        ("required", False, {"call"}),
        (named, False, set()),
    ):
        written = write_grammar(tok, tools, choice, parallel=parallel)
        found = {name for name, text in texts.items() if takes(guidance, tok, written, text)}
        assert found == expected, choice
    assert takes(guidance, tok, write_grammar(tok, tools, named), RESPONSE + CLOSED + calls(call("g", two)) + END)


def test_content_keeps_its_form_or_calls(guidance, tok):
    form = content_rule({"type": "json_object"})
    text, called = '{"a":[1]}' + CLOSED + END, CLOSED + calls(call("f", argument("n", "number", "1"))) + END
    free, tools = write_grammar(tok, content=form), [tool("f", NUMBERS)]
    assert takes(guidance, tok, free, RESPONSE + text) and not takes(guidance, tok, free, RESPONSE + "a" + CLOSED + END)
    either = write_grammar(tok, tools, content=form)
    assert takes(guidance, tok, either, RESPONSE + text) and takes(guidance, tok, either, RESPONSE + called)
    # Without thinking the prompt has opened the response
    begun = write_grammar(tok, content=choice_rule(["yes", "no"]), reasoning=False)
    assert takes(guidance, tok, begun, "no" + CLOSED + END) and not takes(guidance, tok, begun, "maybe" + CLOSED + END)
    assert write_grammar(tok) is None
