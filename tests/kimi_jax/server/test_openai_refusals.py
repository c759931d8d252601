"""The table of bad input, what may be asked under each mode of sampling, and the other paths of OpenAI's API."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from kimi_jax.server import Limits

NAME = "kimi-toy"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "g"}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


def form(**changes):
    return {"response_format": {"type": "json_schema", "json_schema": FORM["json_schema"] | changes}}


def without(key):
    named = {name: value for name, value in FORM["json_schema"].items() if name != key}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def picture(url):
    return user([{"type": "image_url", "image_url": {"url": url}}])


# (fields of a request, what the message says, the parameter that it names)
REFUSED = [
    ({"messages": []}, "messages is empty", "messages"),
    ({"messages": "Hello"}, "$.messages", "messages"),
    ({"messages": [1]}, "$.messages[0]", "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "messages"),
    ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "messages"),
    ({"messages": [{"role": "assistant", "content": "x", "partial": True}, *HELLO]}, "messages[0].partial", "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "x", "partial": True}]}, "reasoning_content", "messages"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls[0]", "messages"),
    (user([{"type": "audio"}]), "messages[0].content[0].type", "messages"),
    (picture("file:///etc/passwd"), "file:// is not fetched", "messages"),
    (picture("http://127.0.0.1:9/x.png"), "http:// is not fetched", "messages"),
    (picture("ms://file-1"), "ms:// is not fetched", "messages"),
    (picture("/etc/passwd"), "may not name local files", "messages"),
    (picture("../config.json"), "may not name local files", "messages"),
    (picture("data:image/png;base64,AAAA"), "", "messages"),
    (picture(None), "", "messages"),
    (user([{"type": "video_url", "video_url": {"url": "/dev/zero"}}]), "may not name local files", "messages"),
    (
        user([{"type": "video_url", "video_url": {"url": "https://a.example/x.gif"}}]),
        "https://a.example/x.gif: https:// is not fetched; expected a data: URL",
        "messages",
    ),
    (
        user([{"type": "image_url", "image_url": "file:///x"}]),
        "file:// is not fetched; expected a data: URL",
        "messages",
    ),
    ({"temperature": -0.1}, "temperature is -0.1", "temperature"),
    ({"temperature": 2.5}, "temperature is 2.5", "temperature"),
    ({"temperature": "hot"}, "$.temperature", "temperature"),
    ({"top_p": 0}, "top_p is 0", "top_p"),
    ({"top_k": -1}, "top_k is -1", "top_k"),
    ({"min_p": 2}, "min_p is 2", "min_p"),
    ({"presence_penalty": 3}, "presence_penalty is 3", "presence_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias", "logit_bias"),
    ({"n": 0}, "n is 0", "n"),
    ({"n": 9}, "n is 9", "n"),
    ({"n": 2, "temperature": 0}, "temperature 0", "n"),
    ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
    ({"max_completion_tokens": 601, "max_tokens": 1}, "at most 600 tokens", "max_tokens"),
    (user("word " * 700), "at most 600 tokens", "max_tokens"),
    ({"seed": -1}, "seed is -1", "seed"),
    ({"stop": ["a"] * 6}, "stop", "stop"),
    ({"stop": ""}, "stop", "stop"),
    ({"top_logprobs": 2}, "logprobs: true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21", "top_logprobs"),
    ({"tool_choice": "required"}, "needs tools", "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "needs tools", "tool_choice"),
    ({"tool_choice": "perhaps", "tools": [TOOL]}, "tool_choice is 'perhaps'", "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "none of the tools",
        "tool_choice",
    ),
    ({"tools": [TOOL, TOOL]}, "which an earlier tool has", "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "at most 128", "tools"),
    ({"tools": [{"type": "builtin"}]}, "tools[0]", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "strict", "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "response_format"),
    (without("name"), "json_schema.name", "response_format"),
    (without("schema"), "json_schema.schema", "response_format"),
    (form(strict="yes"), "json_schema.strict", "response_format"),
    (form(schema=[]), "json_schema.schema", "response_format"),
    (form(schema={"type": "no type"}), "cannot be kept", "response_format or tools"),
    ({"structured_outputs": {"regex": "("}}, "cannot be kept", "response_format or tools"),
    ({"structured_outputs": {"choice": []}}, "choice", "structured_outputs"),
    ({"thinking": {"type": "often"}}, "thinking.type", "thinking"),
    ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, "differ", "thinking"),
    ({"thinking_token_budget": -1}, "budget", "thinking_token_budget"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED)
def test_what_is_wrong_is_said_with_its_field(served, fields, message, param):
    answer = served.http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"] and str(served.engine.processor.folder) not in error["message"]
    assert not served.engine.requests


def test_unknown_fields_are_ignored_and_models_are_known_by_name(served):
    served.engine.text = "</think>Hi"
    body = {
        "model": "other-name",
        "messages": [HELLO[0] | {"mood": "good"}],
        "user": "x",
        "store": False,
        "metadata": {},
    }
    assert served.http.post("/v1/chat/completions", json=body).json()["model"] == "other-name"
    answer = served.http.post("/v1/chat/completions", json={"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    with pytest.raises(openai.NotFoundError, match="model is 'gpt'") as found:
        served.openai.chat.completions.create(model="gpt", messages=HELLO)
    assert found.value.code == "model_not_found"


@pytest.fixture(scope="module")
def kimi(serve):
    return serve(sampling="kimi")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        *(({"temperature": value}, 200) for value in (0.0, 0.6, 1.0)),
        *(({"temperature": value}, 400) for value in (1.1, 2.0, -0.1)),
        ({"top_p": 0.95}, 200),
        ({"top_p": 0.8}, 400),
        ({"presence_penalty": 0, "frequency_penalty": 0, "n": 1}, 200),
        ({"presence_penalty": 0.5}, 400),
        ({"n": 2}, 400),
    ],
)
def test_moonshots_fixed_values_hold_in_its_mode(kimi, fields, status):
    for thinking in ("enabled", "disabled"):
        body = {"model": NAME, "messages": HELLO, "thinking": {"type": thinking}} | fields
        assert kimi.http.post("/v1/chat/completions", json=body).status_code == status


def test_models_are_listed_with_their_length(served):
    models = list(served.openai.models.list())
    assert [(model.id, model.context_length) for model in models] == [(NAME, 600), ("other-name", 600)]
    assert served.openai.models.retrieve("other-name").id == "other-name"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("gpt")


def test_text_completions_go_on_with_texts_and_ids(served, processor):
    served.engine.text = "<think>b STOP c"
    for prompt, count in (("a", 1), ([97, 98], 1), (["a", "bc"], 2), ([[97], [98]], 2)):
        fields = {"model": NAME, "prompt": prompt, "stop": "STOP", "max_tokens": 50}
        answer = served.openai.completions.create(logprobs=1, **fields)
        assert [choice.text for choice in answer.choices] == ["<think>b "] * count
        assert answer.usage.prompt_tokens == sum(len(request.tokens) for request in served.engine.requests)
        texts = [""] * count
        for chunk in served.openai.completions.create(
            model=NAME, prompt=prompt, stop="STOP", max_tokens=50, stream=True
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == ["<think>b "] * count
        served.engine.requests.clear()
    served.openai.completions.create(model=NAME, prompt="<|im_end|>")
    assert processor.config.stop_ids[0] not in served.engine.requests[0].tokens  # a text is no marker
    for fields in (
        {"prompt": []},
        {"prompt": [10**6]},
        {"prompt": [""]},
        {"prompt": "a", "echo": True},
        {"prompt": {}},
    ):
        assert served.http.post("/v1/completions", json={"model": NAME} | fields).status_code == 400


def test_tokenize_counts_as_the_prompt_does(served, processor):
    answer = served.http.post("/tokenize", json={"prompt": "a <think>"}).json()
    assert answer["tokens"] == processor.tokenizer.encode("a <think>", allow_special=False)
    answer = served.http.post("/tokenize", json={"model": NAME, "messages": HELLO}).json()
    assert answer["tokens"] == processor(HELLO).tokens[0].tolist() and answer["count"] == len(answer["tokens"])
    assert served.http.post("/tokenize", json={}).status_code == 400


def test_metrics_count_answers(served):
    served.engine.text = "</think>Hi"
    served.http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO})
    text = served.http.get("/metrics").text
    for name in (
        'kimi_jax_requests_total{finish="stop"}',
        "kimi_jax_generated_tokens_total",
        "kimi_jax_requests_running 1.0",
        "kimi_jax_pages_free 6.0",
        "kimi_jax_drafted_tokens 9.0",
        "kimi_jax_accepted_tokens 5.0",
        "kimi_jax_draft_acceptance_rate 0.555",
        "kimi_jax_draft_accepted_length 1.25",
        "kimi_jax_time_to_first_token_seconds_bucket",
        'kimi_jax_responses_total{path="/v1/chat/completions",status="200"}',
    ):
        assert name in text


@pytest.fixture(scope="module")
def locked(serve):
    return serve(Limits(api_key="sesame", per_client=2, max_body=10_000))


def test_only_the_key_opens(locked):
    for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "sesame"}, {"x-api-key": "sesameé"}):
        answer = locked.http.get(
            "/v1/models", headers=[(key.encode(), value.encode()) for key, value in headers.items()]
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for headers in ({"authorization": "bearer sesame"}, {"x-api-key": "sesame"}):
        assert locked.http.get("/v1/models", headers=headers).status_code == 200
    assert locked.http.post("/v1/messages").json()["error"]["type"] == "authentication_error"
    assert locked.http.get("/health").json() == {"status": "ok"}
    assert locked.http.get("/metrics").status_code == 401


def test_bodies_have_a_largest_size(locked):
    body = {"model": NAME, "messages": [{"role": "user", "content": "x" * 20_000}]}
    key = {"x-api-key": "sesame"}
    assert locked.http.post("/v1/chat/completions", json=body, headers=key).status_code == 413
    pieces = (b"x" * 5_000 for _ in range(3))  # without a length
    headers = key | {"content-type": "application/json"}
    assert (
        locked.http.post("/v1/messages", content=pieces, headers=headers).json()["error"]["type"] == "request_too_large"
    )


def test_bodies_of_all_requests_together_have_a_largest_size(serve):
    one, began, goes_on = serve(Limits(max_body=10_000, all_bodies=12_000)), threading.Event(), threading.Event()
    body = json.dumps({"model": NAME, "messages": HELLO, "unknown": "x" * 8_000}).encode()
    headers = {"content-type": "application/json"}

    def slowly():
        yield body[:7_000]
        began.set()
        goes_on.wait(10)
        yield body[7_000:]

    def post(content):
        return one.http.post("/v1/chat/completions", content=content, headers=headers)

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(post, slowly())
        assert began.wait(10)
        for _ in range(100):  # (the server has the first piece a moment after it was sent)
            refused = post(body)
            if refused.status_code == 429:
                break
        assert "all running requests have more than 12,000 bytes" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        goes_on.set()
        assert first.result().status_code == 200
    assert post(body).status_code == 200


def test_a_full_queue_says_when_to_come_again(served):
    served.engine.full = True
    with pytest.raises(openai.RateLimitError, match="3 requests wait") as found:
        served.openai.chat.completions.create(model=NAME, messages=HELLO)
    assert found.value.response.headers["retry-after"] == "1"


def test_a_client_tries_again_and_gives_up_in_time(served):
    served.engine.text, answered = "</think>Hi", []

    def makes_room(request):
        served.engine.full = False

    hooks = {"response": [makes_room]}
    with openai.DefaultHttpxClient(event_hooks=hooks) as http:
        client = openai.OpenAI(base_url=f"{served.listener.url}/v1", api_key="none", http_client=http, max_retries=1)
        served.engine.full = True
        answered.append(client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message.content)
        served.engine.pause = 0.2
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05, max_retries=0).chat.completions.create(model=NAME, messages=HELLO)
    assert answered == ["Hi"]
