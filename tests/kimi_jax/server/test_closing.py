"""Forms are closed before the tokens run out, however deep a model has gone into them."""

import json

import jsonschema
import numpy as np
import pytest

from kimi_jax.server.closing import DEEPEST, Place
from kimi_jax.server.masks import Masks
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.grammar import write_grammar


@pytest.fixture(scope="module")
def masks(tiny_tokenizer_dir):
    tok = Tokenizer.from_folder(tiny_tokenizer_dir)
    return Masks(tok, tok.vocab_size, [tok.special_tokens["<|im_end|>"]])


def members(required, **properties):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def named(**schemas):
    """Returns the first of some schemas, which refer to each other."""
    return {"$ref": f"#/$defs/{next(iter(schemas))}", "$defs": schemas}


TEXT, NULL = {"type": "string"}, {"type": "null"}
NODE = {"$ref": "#/$defs/node"}
LEAF, BRANCH = members(["kind"], kind={"const": "leaf"}), members(["kind", "of"], kind={"const": "branch"}, of=NODE)
PAIR = {"type": "array", "items": {"type": "number"}, "minItems": 2}
DEEP = {
    "with members that are required after the next level": named(
        node=members(["next", "after", "pair"], next={"anyOf": [NODE, NULL]}, after=TEXT, pair=PAIR)
    ),
    "with optional members": named(node=members([], child=NODE, name=TEXT)),
    "as lists": named(node={"type": "array", "items": NODE}),
    "of two kinds": named(node={"anyOf": [BRANCH, LEAF]}),
}


def answer(masks, schema, max_tokens, wanted, forces=True):
    """Returns the arguments of a model that writes the first of `wanted` that it may, and the tokens; `forces` says
    that forced tokens are taken in at once."""
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    (mask,) = masks.providers(write_grammar(masks.tok, [tool], "required", parallel=False), False, None, max_tokens, 1)
    ids, preferred = [], [token for one in wanted for token in masks.tok.encode(one)]
    while len(ids) < max_tokens and not mask.stopped(ids):
        if forces and (forced := mask.forced(ids)):
            ids += forced
            continue
        allowed = np.flatnonzero(np.unpackbits(mask.next_mask(ids).view(np.uint8), bitorder="little"))
        ids.append(next((token for token in preferred if token in allowed), int(allowed[-1])))
    assert mask.stopped(ids) and len(ids) <= max_tokens, masks.tok.decode(ids)
    (call,) = chat.parse(masks.tok, ids, thinking=False, finish="stop").tool_calls
    found = json.loads(call["function"]["arguments"])
    jsonschema.Draft202012Validator(schema).validate(found)
    return found, ids


@pytest.mark.parametrize("max_tokens", [70, 150, 320])
@pytest.mark.parametrize("schema", DEEP.values(), ids=DEEP)
def test_a_model_that_always_goes_deeper_is_led_out(masks, schema, max_tokens):
    if schema is DEEP["of two kinds"]:
        max_tokens += 250  # the model's choice of a name costs what a level does, more than half of a small margin
    whole = members(["value"], value=schema) | {"$defs": schema["$defs"]}
    found, ids = answer(masks, whole, max_tokens, ["{", "[", '"', "c", "b", "n"])
    text = json.dumps(found)
    assert text.count("[") + text.count("{") >= DEEPEST or min(len(ids), len(text)) > 0.6 * max_tokens


def test_a_form_is_closed_alike_where_each_token_is_a_step(masks):
    schema = DEEP["with members that are required after the next level"]
    assert answer(masks, schema, 150, "{") == answer(masks, schema, 150, "{", forces=False)


def test_a_choice_that_leads_nowhere_is_taken_from_the_model(masks):
    schema = members(["code", "name"], code={"type": "string", "pattern": "^[a-z]+-x$"}, name=TEXT)
    found, _ = answer(masks, schema, 120, ["a", '"'])
    assert found["code"].startswith("aaaa") and found["code"].endswith("-x")


@pytest.mark.parametrize("wanted", ['\\"', '"]}', "]}{["])
def test_brackets_and_quotes_in_a_string_are_text(masks, wanted):
    schema = members(["text", "list"], text={"type": "string", "minLength": 30}, list={"type": "array", "items": TEXT})
    found, _ = answer(masks, schema, 140, [wanted[0], *wanted[1:]])
    assert len(found["text"]) >= 30


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a":"', Place.STRING),
        ('{"a":"]}\\', Place.ESCAPE),
        ('{"a":"]}\\"', Place.STRING),
        ('{"a":"]}\\\\"', Place.OUTSIDE),
        ('{"a":"\\u0022', Place.STRING),
        ('an odd " in text<|tool_call_argument_begin|>', Place.OUTSIDE),
        ("{", Place.OUTSIDE),
    ],
)
def test_the_place_in_json_is_known(masks, text, place):
    ids = masks.tok.encode(text)
    assert masks.closing.place(Place.OUTSIDE, ids) == place
    found = Place.OUTSIDE
    for token in ids:
        found = masks.closing.place(found, [token])
    assert found == place


@pytest.mark.parametrize("schema", [DEEP["with optional members"], DEEP["as lists"]], ids=["objects", "lists"])
def test_a_form_is_no_deeper_than_validators_can_follow(masks, schema):
    whole = members(["value"], value=schema) | {"$defs": schema["$defs"]}
    found, ids = answer(masks, whole, 4096, ["{", "[", '"', "c"])
    text = json.dumps(found)
    assert DEEPEST <= text.count("[") + text.count("{") < 2 * DEEPEST + 8 and len(ids) < 2048
