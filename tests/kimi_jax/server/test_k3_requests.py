"""Requests to a server of Kimi K3, whose reasoning and calls are elements and no single tokens."""

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.server.anthropic_request import messages_request, prompt_request
from kimi_jax.server.anthropic_schema import CountRequest, MessagesRequest, OutputConfig, ToolChoice
from kimi_jax.server.backend import Backend, Prompt
from kimi_jax.server.errors import RequestError
from kimi_jax.server.generation import Chat, prepare
from kimi_jax.server.masks import Masks
from kimi_jax.server.openai_request import chat_request
from kimi_jax.server.openai_schema import ChatRequest, Thinking
from kimi_jax.server.responses_request import responses_request
from kimi_jax.server.responses_schema import Reasoning, ResponsesRequest
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.grammar import content_rule
from kimi_jax.text.tiny import K3_SLOTS, write_tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class PromptsOnly(Backend):
    """A backend that writes prompts, and answers nothing."""

    template, max_length, failed = "k3", 4096, False

    def __init__(self, tok):
        self.tokenizer, self.vocab_size, self.stop_ids = tok, tok.vocab_size, [tok.special_tokens["<|end_of_msg|>"]]

    def prompt(self, messages, tools, thinking, preserve_thinking, options):
        return Prompt(chat.encode(self.tokenizer, messages, tools, thinking=thinking, model=self.template, **options))


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k3")
    write_tiny_tokenizer(folder, slots=K3_SLOTS)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def served(tok):
    """Returns a function from a request to what would be generated."""
    backend = PromptsOnly(tok)
    masks = Masks(backend.tokenizer, backend.vocab_size, backend.stop_ids)
    return lambda request: prepare(backend, masks, request, "open", thinks=True)


@pytest.fixture(scope="module")
def ask(served):
    """Returns a function from the fields of a request to what would be generated."""
    return lambda **fields: served(Chat(**({"messages": MESSAGES} | fields)))


@pytest.mark.parametrize("thinking", [True, False])
def test_a_model_that_may_call_tools_is_held_to_nothing(ask, thinking):
    (settings,) = ask(tools=[TOOL], thinking=thinking).settings
    assert settings.mask_provider is None


def tags(tok, text):
    """Returns the ids of a text with tags, written <+name> and </name>."""
    for sign, marker in (("<+", "<|open|>"), ("</", "<|close|>")):
        text = text.replace(sign, marker)
    return tok.encode(text.replace(">", "<|sep|>").replace("|<|sep|>", "|>"))


def answered(tok, provider, reasoning, seed, most=400):
    """Returns what a model of random weights answers, which reasons in these words if nothing forces its end."""
    random, ids = np.random.default_rng(seed), list(tok.encode(reasoning, allow_special=False))
    while len(ids) < most and not provider.stopped(ids):
        forced = provider.forced(ids)
        if forced:
            ids += forced
            continue
        mask = provider.next_mask(ids)
        allowed = np.flatnonzero(np.unpackbits(np.asarray(mask).view(np.uint8), bitorder="little"))
        ids.append(int(random.choice(allowed)))
    return ids


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]}
EXACT = SCHEMA | {"additionalProperties": False}
STRICT = {"type": "function", "function": {"name": "g", "parameters": EXACT, "strict": True}}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_forced_call_is_made_after_thinking_too(ask, tok, thinking, choice):
    for seed in range(3):
        wanted = ask(tools=[STRICT], tool_choice=choice, thinking=thinking, budget=5, max_tokens=400, parallel=False)
        (settings,) = wanted.settings
        ids = answered(tok, settings.mask_provider, "one two three four five six" if thinking else "", seed)
        starts_in = "reasoning" if thinking else "content"
        (call,) = chat.parse(tok, ids, thinking, [STRICT], "k3", starts_in=starts_in).tool_calls
        assert call["function"]["name"] == "g" and 0 <= json.loads(call["function"]["arguments"])["n"] <= 99
        text = tok.decode(wanted.prompt.ids)
        assert "invoked with `tool_choice=required`" in text


def test_a_form_is_kept_after_thinking_and_shown_in_the_prompt(ask, tok):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": EXACT}}
    wanted = ask(content=content_rule(form), form=form, budget=3, max_tokens=400)
    ids = answered(tok, wanted.settings[0].mask_provider, "a b c d e f", 0)
    said = chat.parse(tok, ids, True, None, "k3", starts_in="reasoning")
    assert 0 <= json.loads(said.content)["n"] <= 99 and said.reasoning
    assert "The JSON data must match the following schema" in tok.decode(wanted.prompt.ids)


def test_a_budget_ends_the_reasoning_with_all_its_tokens(ask, tok):
    (settings,) = ask(budget=4).settings
    ids = tok.encode("one two three four five six", allow_special=False)
    end = tags(tok, "</think>")
    assert len(end) > 2 and settings.mask_provider.forced(ids[:3]) == []
    assert settings.mask_provider.forced(ids[:4]) == end
    ended = [*ids[:4], *end]
    assert settings.mask_provider.forced(ended) == [] and settings.mask_provider.next_mask(ended) is None


@pytest.mark.parametrize(("effort", "shown"), [(None, "max"), ("low", "low"), ("high", "high"), ("max", "max")])
def test_an_effort_stands_in_the_prompt(ask, tok, effort, shown):
    assert f"invoked with `thinking_effort={shown}`" in tok.decode(ask(effort=effort).prompt.ids)


def openai():
    return chat_request(ChatRequest(model="m", messages=MESSAGES, reasoning_effort="medium"))


def responses():
    return responses_request(ResponsesRequest(model="m", input="Hello", reasoning=Reasoning(effort="medium")))


def anthropic():
    config = OutputConfig(effort="medium")
    return messages_request(MessagesRequest(model="m", messages=MESSAGES, max_tokens=9, output_config=config))


@pytest.mark.parametrize(
    ("asked", "field"),
    [(openai, "reasoning_effort"), (responses, "reasoning.effort"), (anthropic, "output_config.effort")],
)
def test_an_effort_that_the_template_does_not_know_is_refused(served, asked, field):
    with pytest.raises(RequestError, match=rf"^{field} is 'medium', expected none, low, high, max$") as found:
        served(asked())
    assert found.value.param == field.split(".")[0]


def test_a_count_is_of_the_prompt_that_a_message_has():
    asked = {"model": "m", "messages": MESSAGES, "thinking": Thinking("enabled"), "tool_choice": ToolChoice("any")}
    asked |= {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    asked |= {"output_config": OutputConfig({"type": "json_schema", "schema": SCHEMA}, "low")}
    sent, counted = messages_request(MessagesRequest(**asked, max_tokens=9)), prompt_request(CountRequest(**asked))
    fields = ("messages", "tools", "tool_choice", "thinking", "effort", "effort_field", "form")
    assert [getattr(counted, name) for name in fields] == [getattr(sent, name) for name in fields]
    assert (counted.effort, counted.tool_choice, counted.thinking) == ("low", "required", True) and counted.form


def test_no_call_is_made_with_tool_choice_none(ask, tok):
    wanted = ask(tools=[STRICT], tool_choice="none", budget=2, max_tokens=100)
    assert "You MUST NOT call any tools" in tok.decode(wanted.prompt.ids)
    ids = answered(tok, wanted.settings[0].mask_provider, "a b c", 1, most=100)
    assert chat.parse(tok, ids, True, [STRICT], "k3", starts_in="reasoning").tool_calls == []


def test_an_answer_goes_on_from_what_is_there(ask, tok):
    begun = {"role": "assistant", "content": "It is", "reasoning_content": "I know.", "partial": True}
    wanted = ask(messages=[*MESSAGES, begun])
    expected = tags(tok, "<+think>I know.</think><+response>It is")
    assert wanted.prompt.ids[-len(expected) :] == expected
    assert wanted.settings[0].mask_provider is None


def test_content_without_thinking_keeps_its_form(ask):
    (settings,) = ask(content='"yes"', thinking=False).settings
    assert settings.mask_provider.forced([])


NAMES = st.text(st.sampled_from('ab_.-é"&<>= '), min_size=1, max_size=6)
TEXTS = st.text(st.sampled_from('ab"&<>\\\n é{}'), max_size=6)
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-9, 9).map(lambda least: {"type": "integer", "minimum": least, "maximum": least + 20}),
    st.integers(0, 4).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(TEXTS | st.integers(-9, 9) | st.none(), min_size=1, max_size=3).map(lambda one: {"enum": one}),
    TEXTS.map(lambda one: {"const": one}),
    st.just({"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
)


def object_of(values):
    """Returns a strategy of schemas of objects with properties of these schemas, some of them required."""

    def of(properties):
        required = st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([])
        fixed = {"type": "object", "properties": properties, "additionalProperties": False}
        return required.map(lambda names: fixed | {"required": names})

    return st.dictionaries(NAMES, values, max_size=3).flatmap(of)


OBJECTS = object_of(
    st.recursive(
        LEAVES,
        lambda one: object_of(one) | one.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        max_leaves=3,
    )
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, OBJECTS, min_size=1, max_size=2), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_forced_call_is_read_back_as_its_schema_has_it(ask, tok, tools, thinking, named, seed):
    declared = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
        for name, schema in tools.items()
    ]
    name = next(iter(tools))
    choice = {"type": "function", "function": {"name": name}} if named else "required"
    fields = {"tools": declared, "tool_choice": choice, "parallel": False, "thinking": thinking, "budget": 3}
    (found,) = ask(**fields, max_tokens=600).settings
    ids = answered(tok, found.mask_provider, "one two three" if thinking else "", seed, most=600)
    said = chat.parse(tok, ids, thinking, declared, "k3")
    (call,) = said.tool_calls
    assert call["function"]["name"] in ([name] if named else tools) and not said.content
    schema = tools[call["function"]["name"]]
    jsonschema.Draft202012Validator(schema).validate(json.loads(call["function"]["arguments"]))


@settings(max_examples=25, deadline=None)
@given(OBJECTS, st.booleans(), st.integers(0, 99))
def test_any_form_is_read_back_as_its_schema_has_it(ask, tok, schema, thinking, seed):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields = {"content": content_rule(form), "form": form, "thinking": thinking, "budget": 3}
    (found,) = ask(**fields, max_tokens=600).settings
    ids = answered(tok, found.mask_provider, "one two three" if thinking else "", seed, most=600)
    said = chat.parse(tok, ids, thinking, None, "k3")
    assert not said.tool_calls
    jsonschema.Draft202012Validator(schema).validate(json.loads(said.content))
