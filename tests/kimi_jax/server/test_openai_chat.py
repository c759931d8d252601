"""Chat completions through OpenAI's own client: streamed and whole answers, tools, thinking, forms, choices."""

import asyncio
import json

import jsonschema
import openai
import pytest

NAME = "kimi-toy"
HELLO = [{"role": "user", "content": "Hello"}]
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def ask(served, messages=HELLO, **fields):
    return served.openai.chat.completions.create(model=NAME, messages=messages, **fields)


def joined(chunks):
    """Returns the message, reason and usage that the chunks of a stream come to."""
    message, finish, usage = {"content": "", "reasoning_content": "", "tool_calls": []}, None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key) or ""
            for call in delta["tool_calls"] or ():
                if call["id"]:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append([call["id"], call["function"]["name"], ""])
                message["tool_calls"][call["index"]][2] += call["function"]["arguments"]
            finish = choice.finish_reason or finish
    return message, finish, usage


def whole(answer):
    (choice,) = answer.choices
    message = choice.message.model_dump()
    calls = [[call["id"], *map(call["function"].get, ("name", "arguments"))] for call in message["tool_calls"] or ()]
    parts = {key: message.get(key) or "" for key in ("content", "reasoning_content")}
    return parts | {"tool_calls": calls}, choice.finish_reason, answer.usage


@pytest.mark.parametrize(
    "text",
    [
        "Let me see.</think>Hello, 今天 there!",
        "I need data.</think>One moment." + CALL.format(name="weather", number=0, arguments='{"city": "Oslo"}'),
        "only thoughts",
        "</think>" + "word " * 50 + "more than there is room for",
    ],
)
def test_a_stream_has_what_the_whole_answer_has(served, text):
    served.engine.text, served.engine.cached = text, 1
    fields = {"tools": [WEATHER], "max_tokens": 100}
    once = whole(ask(served, **fields))
    streamed = joined(ask(served, stream=True, stream_options={"include_usage": True}, **fields))
    assert streamed == once
    message, finish, usage = once
    assert finish == ("length" if len(text) > 200 else "tool_calls" if message["tool_calls"] else "stop")
    assert usage.prompt_tokens == len(served.engine.requests[0].tokens)
    assert usage.prompt_tokens_details.cached_tokens == usage.cached_tokens == 1
    reasoning = served.engine.processor.tokenizer.encode(message["reasoning_content"])
    assert usage.completion_tokens_details.reasoning_tokens == len(reasoning)


def test_the_first_chunk_has_the_role_and_the_last_choice_its_usage(served):
    served.engine.text = "</think>Hi"
    chunks = list(ask(served, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices for chunk in chunks)  # without include_usage there is none without a choice
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].usage["completion_tokens"] == 4


def test_tools_over_three_turns_keep_their_ids_and_the_reasoning(served, processor):
    messages = [{"role": "user", "content": "Is it warmer in Oslo or in Rome?"}]
    for number, city in enumerate(("Oslo", "Rome")):
        arguments = json.dumps({"city": city})
        served.engine.text = f"I ask {city}.</think>" + CALL.format(name="weather", number=number, arguments=arguments)
        answer = ask(served, messages, tools=[WEATHER]).choices[0].message
        (call,) = answer.tool_calls
        assert (call.id, json.loads(call.function.arguments)) == (f"functions.weather:{number}", {"city": city})
        messages += [answer.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}]
    served.engine.text = "Done.</think>They are the same."
    assert ask(served, messages, tools=[WEATHER]).choices[0].message.content == "They are the same."
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    assert "<think>I ask Oslo.</think>" in prompt and "## Return of functions.weather:1\n20 degrees" in prompt


def test_an_answer_begins_no_call_where_no_tool_is_declared(served, processor):
    served.engine.text = "Fine.</think>Yes."
    marks = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    ask(served)
    assert {processor.tokenizer.special_tokens[mark] for mark in marks} <= set(served.engine.requests[-1].banned)
    ask(served, tools=[WEATHER])
    assert served.engine.requests[-1].banned == ()


THINKING = [
    ({}, True),
    ({"thinking": {"type": "disabled"}}, False),
    ({"thinking": {"type": "enabled"}}, True),
    ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ({"reasoning_effort": "none"}, False),
    ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": False}}, False),
]


@pytest.mark.parametrize(("fields", "expected"), THINKING)
def test_thinking_is_said_in_several_ways_and_sets_the_temperature(served, processor, fields, expected):
    served.engine.text = "Hm.</think>Yes." if expected else "Yes."
    message = ask(served, extra_body=fields).choices[0].message
    assert message.content == "Yes." and getattr(message, "reasoning_content", None) == ("Hm." if expected else None)
    (request,) = served.engine.requests
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0 if expected else 0.6, 0.95)


def test_earlier_reasoning_is_kept_on_request(served, processor):
    turn = {"role": "assistant", "content": "Yes.", "reasoning": "Because."}
    for fields in ({}, {"thinking": {"keep": "all"}}, {"chat_template_kwargs": {"preserve_thinking": True}}):
        ask(served, [*HELLO, turn, *HELLO], extra_body=fields)
        prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
        assert ("<think>Because.</think>" in prompt) == bool(fields)


def test_stop_strings_end_the_content_and_not_the_reasoning(served):
    served.engine.text = "END is near</think>one two END three"
    for stream in (False, True):
        answer = ask(served, stop=["END", "xyz"], stream=stream)
        message, finish, _ = joined(answer) if stream else whole(answer)
        assert (message["reasoning_content"], message["content"], finish) == ("END is near", "one two ", "stop")
    served.engine.text = "</think>no e"  # the beginning of a stop string at the end is content
    assert whole(ask(served, stop="end"))[0]["content"] == "no e"


def test_logprobs_come_with_every_token(served):
    served.engine.text = "</think>Hello there"
    once = ask(served, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        token
        for chunk in ask(served, logprobs=True, top_logprobs=2, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert once == streamed and "".join(token.token for token in once) == served.engine.text
    assert [len(token.top_logprobs) for token in once] == [2] * len(once)


def test_choices_have_seeds_of_their_own(served):
    served.engine.answer = lambda request: lambda tokens: 40 + request.seed if len(tokens) < 3 else None
    fields = {"n": 3, "seed": 5, "extra_body": {"thinking": {"type": "disabled"}}}
    answer = ask(served, **fields)
    decode = served.engine.processor.tokenizer.decode
    expected = [decode([45 + index] * 3) for index in range(3)]
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 12
    contents = ["", "", ""]
    for chunk in ask(served, stream=True, **fields):
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
    assert contents == expected


def random_tokens(engine, width):
    """Makes the engine answer as a model of random weights does."""
    engine.answer = lambda request: lambda tokens: int(engine.random.integers(width))


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_a_forced_call_is_valid_whatever_the_weights(served):
    random_tokens(served.engine, 512)
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
    history = [{"role": "assistant", "content": "", "tool_calls": [{"id": "functions.f:3", **tool}]}]
    history[0]["tool_calls"][0]["function"] = {"name": "f", "arguments": "{}"}
    asked = [*HELLO, *history, {"role": "tool", "tool_call_id": "functions.f:3", "content": "?"}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        message, finish, usage = whole(ask(served, asked, tools=[tool], tool_choice=choice, max_tokens=300))
        assert finish == "tool_calls" and message["content"] == ""
        assert message["tool_calls"][0][:2] == ["functions.f:4", "f"]
        for call in message["tool_calls"]:
            jsonschema.validate(json.loads(call[2]), SCHEMA)
        assert usage.completion_tokens_details.reasoning_tokens <= 150  # half of what there is


def test_content_keeps_its_form_whatever_the_weights(served):
    random_tokens(served.engine, 512)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    fields = {"max_tokens": 200, "extra_body": {"thinking_token_budget": 3}}
    message, finish, usage = whole(ask(served, response_format=form, **fields))
    assert finish == "stop" and usage.completion_tokens_details.reasoning_tokens == 3
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
    for outputs, expected in (({"choice": ["yes", "no"]}, ("yes", "no")), ({"regex": "a{3}"}, ("aaa",))):
        body = {"structured_outputs": outputs, "thinking": {"type": "disabled"}}
        assert whole(ask(served, extra_body=body))[0]["content"] in expected


LOOSE = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "array", "minItems": 2, "items": {"type": ["string", "number"]}},
        "c": {"type": "object", "minProperties": 1},
        "d": {"type": "number"},
    },
    "required": ["a", "b", "c", "d"],
}


@pytest.mark.parametrize("goes_on", ["a", ',"', "1"])
def test_a_form_is_closed_before_its_tokens_run_out(served, processor, goes_on):
    ids = processor.tokenizer.encode(goes_on)  # weights that never come to an end
    served.engine.answer = lambda request: lambda tokens: ids[len(tokens) % len(ids)]
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": LOOSE}}
    body = {"max_tokens": 400, "extra_body": {"thinking": {"type": "disabled"}}}
    message, finish, usage = whole(ask(served, tools=[tool], tool_choice="required", **body))
    assert finish == "length" and 300 <= usage.completion_tokens < 400
    for call in message["tool_calls"]:
        jsonschema.validate(json.loads(call[2]), LOOSE)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOSE}}
    message, finish, _ = whole(ask(served, response_format=form, **body))
    assert finish == "length"
    jsonschema.validate(json.loads(message["content"]), LOOSE)
    # Text of its own is not closed, and uses all tokens
    _, finish, usage = whole(ask(served, tools=[tool], **body))
    assert (finish, usage.completion_tokens) == ("length", 400)


def test_no_call_is_made_where_none_may_be(served):
    served.engine.text = "</think>" + CALL.format(name="weather", number=0, arguments="{}")
    message, _, _ = whole(ask(served, tools=[WEATHER], tool_choice="none", max_tokens=30))
    assert not message["tool_calls"]


def test_a_partial_message_is_continued(served, processor):
    served.engine.text = "1, 2"
    for thinking, reasoning, expected in (
        ("disabled", None, "<|im_assistant|>assistant<|im_middle|><think></think>The list: "),
        ("enabled", "Hm.", "<|im_assistant|>assistant<|im_middle|><think>Hm.</think>The list: "),
    ):
        last = {"role": "assistant", "content": "The list: ", "partial": True, "reasoning_content": reasoning}
        body = {"thinking": {"type": thinking}}
        assert whole(ask(served, [*HELLO, last], extra_body=body))[0]["content"] == "1, 2"
        assert processor.tokenizer.decode(served.engine.requests[-1].tokens).endswith(expected)
    last["name"] = "Ada"
    ask(served, [*HELLO, last])
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    assert prompt.endswith("<|im_assistant|>Ada<|im_middle|><think>Hm.</think>The list: ")


def test_the_asynchronous_client_runs_many_at_once(served):
    served.engine.text, served.engine.pause = "Hm.</think>" + "word " * 10, 0.001

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{served.listener.url}/v1", api_key="none", max_retries=0) as client:

            async def one():
                stream = await client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
                return joined([chunk async for chunk in stream])[0]["content"]

            return await asyncio.gather(*(one() for _ in range(16)))

    assert asyncio.run(all_of_them()) == ["word " * 10] * 16
