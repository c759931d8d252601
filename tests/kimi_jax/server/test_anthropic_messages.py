"""Messages through Anthropic's own client: streamed and whole answers, tools, thinking, pictures, counts."""

import base64
import io
import json

import pytest
from PIL import Image

NAME = "kimi-toy"
HELLO = [{"role": "user", "content": "Hello"}]
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{arguments}"
    "<|tool_call_end|><|tool_calls_section_end|>"
)
WEATHER = {
    "name": "weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINKING = {"type": "enabled", "budget_tokens": 1024}


def ask(served, messages=HELLO, **fields):
    return served.anthropic.messages.create(**{"model": NAME, "messages": messages, "max_tokens": 200} | fields)


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("Hm.</think>Hello, 今天 there!", ["thinking", "text"], "end_turn"),
        ("Hm.</think>" + CALL.format(arguments='{"city": "Oslo"}'), ["thinking", "tool_use"], "tool_use"),
        ("Hm.</think>Text." + CALL.format(arguments=""), ["thinking", "text", "tool_use"], "tool_use"),
        ("no end of it " * 40, ["thinking"], "max_tokens"),
    ],
)
def test_a_stream_has_what_the_whole_answer_has(served, text, kinds, reason):
    served.engine.text, served.engine.cached = text, 2
    fields = {"tools": [WEATHER], "thinking": THINKING}
    once = ask(served, **fields)
    assert ([block.type for block in once.content], once.stop_reason) == (kinds, reason)
    with served.anthropic.messages.stream(
        model=NAME, messages=HELLO, max_tokens=200, tools=[WEATHER], thinking=THINKING
    ) as stream:
        names = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert names[0] == "message_start" and names[-1] == "message_stop"
    assert streamed.model_dump(exclude={"id"}) == once.model_dump(exclude={"id"})
    assert (once.usage.input_tokens, once.usage.cache_read_input_tokens) == (
        len(served.engine.requests[0].tokens) - 2,
        2,
    )
    if "tool_use" in kinds:
        assert once.content[-1].input == json.loads(text.split("begin|>")[-1].split("<")[0] or "{}")


def test_tools_over_turns_with_thinking_given_back(served, processor):
    served.engine.text = "I ask.</think>" + CALL.format(arguments='{"city": "Oslo"}')
    answer = ask(served, tools=[WEATHER], thinking=THINKING)
    result = {
        "type": "tool_result",
        "tool_use_id": answer.content[-1].id,
        "content": [{"type": "text", "text": "20 C"}],
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    served.engine.text = "</think>Warm."
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    answer = ask(served, messages, tools=[WEATHER], thinking=THINKING, system=system)
    assert answer.content[-1].text == "Warm."
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    for part in ("<|im_middle|>Be brief.<|im_end|>", "<think>I ask.</think>", "weather:0\n20 C", "<|im_middle|>And?"):
        assert part in prompt


def test_thinking_is_off_unless_asked_for_and_its_budget_holds(served):
    served.engine.text = "Yes."
    assert [block.type for block in ask(served).content] == ["text"]
    served.engine.text = "thoughts " * 20
    answer = ask(served, thinking={"type": "enabled", "budget_tokens": 5}, max_tokens=20)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert len(served.engine.processor.tokenizer.encode(answer.content[0].thinking)) == 5


def test_a_stop_sequence_is_named(served):
    served.engine.text = "one two END three"
    answer = ask(served, stop_sequences=["x", "END"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "END", "one two ")


def test_a_tool_is_forced(served):
    served.engine.answer = lambda request: lambda tokens: int(served.engine.random.integers(512))
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        answer = ask(served, tools=[WEATHER | {"strict": True}], tool_choice=choice, max_tokens=300)
        assert answer.stop_reason in ("tool_use", "max_tokens")  # (a string may be long)
        assert {block.type for block in answer.content} == {"tool_use"}


def picture():
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_pictures_come_as_data_in_both_apis(served):
    data = picture()
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    ask(served, [{"role": "user", "content": [block, {"type": "text", "text": "What is it?"}]}])
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": "low"}}
    text = {"type": "text", "text": "What is it?"}
    served.openai.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": [part, text]}],
        extra_body={"thinking": {"type": "disabled"}},
    )
    first, second = served.engine.requests
    assert first.tokens == second.tokens and (first.media.patches == second.media.patches).all()
    counted = served.anthropic.messages.count_tokens(
        model=NAME, messages=[{"role": "user", "content": [block, {"type": "text", "text": "What is it?"}]}]
    )
    assert counted.input_tokens == len(first.tokens)


def test_the_last_answer_of_a_conversation_is_continued(served, processor):
    served.engine.text = "1, 2"
    answer = ask(served, [*HELLO, {"role": "assistant", "content": "The list: "}])
    assert answer.content[0].text == "1, 2"
    assert processor.tokenizer.decode(served.engine.requests[-1].tokens).endswith("</think>The list: ")


def image(source):
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


REFUSED = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 10**6}, "at most 600 tokens in all"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role is 'tool'"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type is 'video'"),
    (image({"type": "file", "file_id": "x"}), "messages[0].content[0].source is no object of type base64 or url"),
    (image({"type": "url"}), "messages[0].content[0].source.url is no text"),
    (image({"type": "url", "url": "https://example.org/x.png"}), "https:// is not fetched"),
    (image({"type": "url", "url": "/etc/passwd"}), "may not name local files"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] is no tool of the client's own"),
    ({"tool_choice": {"type": "any"}}, "which needs tools"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"thinking": {"type": "often"}}, "thinking.type"),
    ({"temperature": 3.0}, "temperature is 3"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"top_k": "x"}, "$.top_k"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_wrong_is_said_in_anthropics_object(served, fields, message):
    body = {"model": NAME, "messages": HELLO, "max_tokens": 20} | fields
    answer = served.http.post("/v1/messages", json=body)
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message in error["error"]["message"]
    answer = served.http.post("/v1/messages", json={"model": "gpt", "messages": HELLO, "max_tokens": 20})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_request_as_claude_code_sends_it_is_answered(served, processor):
    served.engine.text = "Hm.</think>" + CALL.format(arguments='{"city": "Oslo"}')
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": NAME,
        "max_tokens": 200,
        "stream": True,
        "system": [{"type": "text", "text": "You are a coder."}, {"type": "text", "text": "Be brief."} | cached],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Weather?"} | cached]}],
        "tools": [WEATHER | cached, WEATHER | {"name": "other", "eager_input_streaming": True}],
        "metadata": {"user_id": "x"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "output_config": {"effort": "medium"},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b-2025-01-01"}
    with served.http.stream("POST", "/v1/messages?beta=true", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert names[0] == "message_start" and names[-1] == "message_stop"
    prompt = processor.tokenizer.decode(served.engine.requests[0].tokens)
    assert "You are a coder.\n\nBe brief." in prompt
    del body["stream"], body["max_tokens"]
    count = served.http.post("/v1/messages/count_tokens?beta=true", json=body, headers=headers).json()["input_tokens"]
    assert count == len(served.engine.requests[0].tokens)
