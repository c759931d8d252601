"""Responses through OpenAI's own client: streamed and whole ones, tools over turns, reasoning given back, refusals."""

import openai
import pytest

NAME = "kimi-toy"
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{arguments}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
FORM = {"type": "json_schema", "name": "x", "schema": {"enum": [True, "no"]}, "strict": True}


def ask(served, given="Hello", **fields):
    return served.openai.responses.create(model=NAME, input=given, max_output_tokens=100, **fields)


def without_names(response):
    """Returns a response without its names and its time, which are new in each."""
    fields = response.model_dump(exclude={"id", "created_at"})
    return fields | {"output": [{key: item[key] for key in item if key != "id"} for item in fields["output"]]}


@pytest.mark.parametrize(
    ("text", "kinds", "status"),
    [
        ("Hm.</think>Hello, 今天 there!", ["reasoning", "message"], "completed"),
        ("Hm.</think>" + CALL.format(arguments='{"city": "Oslo"}'), ["reasoning", "function_call"], "completed"),
        ("</think>Text." + CALL.format(arguments=""), ["message", "function_call"], "completed"),
        ("no end of it " * 40, ["reasoning"], "incomplete"),
        ("</think>", [], "completed"),
    ],
)
def test_a_stream_has_what_the_whole_response_has(served, text, kinds, status):
    served.engine.text, served.engine.cached = text, 2
    once = ask(served, tools=[WEATHER])
    assert ([item.type for item in once.output], once.status) == (kinds, status)
    events = list(ask(served, tools=[WEATHER], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{status}"
    assert without_names(events[-1].response) == without_names(once)
    for index, item in enumerate(events[-1].response.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert (mine[0].type, mine[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1].item == item
        pieces = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert pieces == (item.arguments if item.type == "function_call" else item.content[0].text)
    usage = once.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (
        len(served.engine.requests[0].tokens),
        2,
    )
    assert usage.output_tokens_details.reasoning_tokens > 0 or "reasoning" not in kinds


def test_tools_over_turns_with_reasoning_given_back(served, processor):
    served.engine.text = "I ask.</think>Well." + CALL.format(arguments='{"city": "Oslo"}')
    first = ask(served, tools=[WEATHER], instructions="Be brief.")
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        *(item.model_dump() for item in first.output),
        {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "20 C"},
    ]
    served.engine.text = "Warm?</think>Warm."
    second = ask(served, history, tools=[WEATHER], instructions="Be brief.")
    assert second.output_text == "Warm."
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    call = CALL.format(arguments='{"city": "Oslo"}')
    for part in ("<|im_middle|>Be brief.<|im_end|>", f"<think>I ask.</think>Well.{call}", "weather:0\n20 C"):
        assert part in prompt
    calls = [
        {"type": "function_call", "call_id": f"functions.weather:{index}", "name": "weather", "arguments": "{}"}
        for index in range(2)
    ]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "1 C"} for call in calls]
    ask(served, [{"role": "user", "content": "Both?"}, *calls, *results])
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    assert prompt.count("<|tool_calls_section_begin|>") == 1 and prompt.count("<|tool_call_begin|>") == 2


def test_a_form_and_a_tool_are_forced(served):
    served.engine.answer = lambda request: lambda tokens: int(served.engine.random.integers(512))
    assert ask(served, text={"format": FORM}, reasoning={"effort": "none"}).output_text in ("true", '"no"')
    empty = WEATHER | {
        "strict": True,
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    for choice in ("required", {"type": "function", "name": "weather"}):
        (call,) = ask(
            served, tools=[empty], tool_choice=choice, parallel_tool_calls=False, reasoning={"effort": "none"}
        ).output
        assert (call.type, call.name, call.arguments) == ("function_call", "weather", "{}")


REFUSED = [
    ({"input": []}, "input is empty", "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type is 'item_reference'", "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role is 'robot'", "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "input"),
    ({"input": [{"role": "user", "content": 1}]}, "input[0].content is neither", "input"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input[0].arguments is no text", "input"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
        "file:// is not fetched",
        "messages",
    ),
    ({"previous_response_id": "resp_1"}, "nothing is stored", "previous_response_id"),
    ({"background": True}, "nothing is stored", "background"),
    ({"max_output_tokens": 0}, "max_output_tokens is 0", "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "at most 600 tokens in all", "max_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0] is no function", "tools"),
    ({"tool_choice": "required"}, "needs tools", "tool_choice"),
    ({"text": {"format": FORM | {"name": 1}}}, "text.format.name", "text"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type is 'xml'", "text"),
    ({"thinking": {"budget_tokens": -1}}, "budget_tokens is -1", "thinking"),
    ({"temperature": 3.0}, "temperature is 3", "temperature"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED)
def test_what_is_wrong_is_said(served, fields, message, param):
    answer = served.http.post("/v1/responses", json={"model": NAME, "input": "Hello"} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_an_engine_that_fails_ends_the_stream_with_an_error_event(served):
    served.engine.error = "a fault in /secret/path"
    *_, last = ask(served, stream=True)
    assert (last.type, last.code) == ("error", "internal_error") and "/secret" not in last.message
    with pytest.raises(openai.InternalServerError, match="failed to answer"):
        ask(served)


def test_wishes_about_thinking_that_differ_are_named_as_this_interface_names_them(served):
    with pytest.raises(openai.BadRequestError, match=r"thinking and reasoning\.effort differ"):
        ask(served, reasoning={"effort": "none"}, extra_body={"thinking": {"type": "enabled"}})
