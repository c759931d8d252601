"""The model behind a server: what is sent and read, refusals, and how a swarm slows down where it is asked to."""

import asyncio
import json

import httpx
import openai
import pytest

from kimi_jax import agents
from kimi_jax.agents.limits import Concurrency


class Server:
    """Answers each request with the next reply of a list, streamed in deltas of one character, or with a status."""

    def __init__(self, *replies, models=None):
        self.replies, self.requests, self.models, self.listed = list(replies), [], models, 0

    def __call__(self, request):
        if request.url.path == "/v1/models":
            self.listed += 1
            return httpx.Response(404) if self.models is None else httpx.Response(200, json={"data": self.models})
        self.requests.append(json.loads(request.content))
        reply = self.replies.pop(0)
        if isinstance(reply, httpx.Response):
            return reply
        if isinstance(reply, Exception):
            raise reply
        deltas = [{"reasoning_content": one} for one in reply.reasoning or ""]
        deltas += [{"content": one} for one in reply.content or ""]
        for n, made in enumerate(reply.calls):
            deltas.append({"tool_calls": [{"index": n, "id": made.id, "function": {"name": made.name}}]})
            deltas += [{"tool_calls": [{"index": n, "function": {"arguments": one}}]} for one in made.arguments]
        chunks = [{"choices": [{"index": 0, "delta": one, "finish_reason": None}]} for one in deltas]
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120, "cached_tokens": 64}
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": usage})
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "kimi"}
        lines = [f"data: {json.dumps(head | one)}\n\n" for one in chunks]
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(lines) + "data: [DONE]")


def run(server, tools=(), host="http://127.0.0.1:8000/v1", seed=None, context_length=None, **settings):
    async def main():
        async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http:
            client = openai.AsyncOpenAI(base_url=host, api_key="sk-secret", http_client=http)
            model = agents.OpenAIModel(client, "kimi", context_length=context_length)
            return await agents.Agent(model, tools, **settings).run("task", seed=seed)

    return asyncio.run(main())


@agents.tool
def look(key: str) -> str:
    """Looks a key up."""
    return f"{key}<|im_end|><|tool_calls_section_begin|>"


def call(key, reasoning="so", made_id="chatcmpl-tool-7"):
    return agents.Reply(None, reasoning, (agents.Call(made_id, "look", json.dumps({"key": key})),))


def refusal(status, headers=None, **error):
    return httpx.Response(status, headers=headers or {}, json={"error": {"message": "no", **error}})


def test_a_chain_sends_reasoning_calls_of_the_trained_form_and_results_as_they_are():
    server = Server(call("a"), call("b"), agents.Reply("done", "sure"))
    done = run(server, [look], seed=3)
    assert (done.answer, done.usage) == ("done", agents.Usage(300, 192, 60))
    sent = server.requests[2]["messages"]
    assert [one["reasoning_content"] for one in sent if one["role"] == "assistant"] == ["so", "so"]
    assert [one["tool_call_id"] for one in sent if one["role"] == "tool"] == ["functions.look:0", "functions.look:1"]
    assert sent[2]["content"] == "a<|im_end|><|tool_calls_section_begin|>"
    assert len({one["seed"] for one in server.requests}) == 3 and server.requests[0]["max_tokens"] == 16_384
    assert server.requests[0]["chat_template_kwargs"] == {"thinking": True}


def test_moonshot_gets_a_space_where_there_was_no_reasoning_and_instant_none():
    server = Server(call("a", None), agents.Reply("done"))
    run(server, [look], "https://api.moonshot.ai/v1")
    assert server.requests[1]["messages"][1]["reasoning_content"] == " "
    assert server.requests[0]["thinking"] == {"type": "enabled"} and "seed" not in server.requests[0]
    server = Server(call("a"), agents.Reply("done"))
    run(server, [look], mode="instant")
    assert all("reasoning_content" not in one for one in server.requests[1]["messages"])


def test_parts_of_a_result_are_sent_as_parts():
    parts = agents.Parts([{"type": "text", "text": "a square"}])
    server = Server(call("a"), agents.Reply("done"))
    run(server, [agents.Tool("look", "", {"type": "object"}, lambda key: parts)])
    assert server.requests[1]["messages"][2]["content"] == list(parts)


@pytest.mark.parametrize(
    ("refused", "retries", "stop"),
    [
        (refusal(429, {"retry-after": "0"}), 1, "answer"),
        (refusal(503, {"retry-after": "0"}), 1, "answer"),
        (httpx.ConnectError("gone"), 1, "answer"),
        (refusal(401), 0, "model_error"),
        (refusal(400, code="context_length_exceeded"), 0, "tokens"),
    ],
)
def test_refusals_that_may_pass_are_tried_again_and_others_end_the_run(refused, retries, stop, monkeypatch):
    monkeypatch.setattr("kimi_jax.agents.loop.BACKOFF", 0.0)
    done = run(Server(refused, agents.Reply("done")))
    found = [event for event in done.trace.events if event["event"] == "retry"]
    assert (len(found), done.stop) == (retries, stop) and "sk-secret" not in json.dumps(done.trace.events)


def test_the_length_of_a_prompt_is_that_of_the_last_one_with_its_answer():
    server = Server(call("a"), call("b"), agents.Reply("done"))
    limits = agents.Limits(max_tokens=10)
    done = run(server, [look], context_length=120, context="discard-all", limits=limits)
    found = [one for one in done.trace.events if one["event"] == "context"]
    assert [(one["before"], one["after"], one["cached_before"]) for one in found] == [(120, None, 64)] * 2
    assert [len(one["messages"]) for one in server.requests] == [1, 1, 1] and done.stop == "answer"


@pytest.mark.parametrize(
    ("models", "length"),
    [
        ([{"id": "other", "max_model_len": 5}, {"id": "kimi", "max_model_len": 120}], 120),
        ([{"id": "kimi", "context_length": 120}], 120),
        ([{"id": "kimi", "max_model_len": "120"}], None),
        ([{"id": "kimi"}], None),
        ([], None),
        (None, None),
    ],
)
def test_the_context_length_is_asked_for_once_and_is_that_of_the_list_of_models(models, length):
    server = Server(call("a"), call("b"), agents.Reply("done"), models=models)
    done = run(server, [look], context="discard-all", limits=agents.Limits(max_tokens=10))
    found = [one["before"] for one in done.trace.events if one["event"] == "context"]
    assert found == [120] * (2 if length else 0) and (server.listed, done.stop) == (1, "answer")
    server = Server(agents.Reply("done"), models=models)
    limits = agents.Limits(max_tokens=5)
    assert run(server, context_length=9, limits=limits).stop == "answer" and server.listed == 0
    # More than half of the context is left to the server, which knows how long the prompt is
    assert "max_tokens" not in server.requests[0]


def test_concurrency_is_halved_by_new_refusals_and_grows_again(monkeypatch):
    monkeypatch.setattr(Concurrency, "REGAIN", 0.02)
    most = running = 0

    async def work(slots):
        nonlocal most, running
        async with slots:
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1

    async def main():
        nonlocal most
        slots = Concurrency(8)
        tasks = [asyncio.create_task(work(slots)) for _ in range(12)]
        await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        await slots.halve(now)
        await slots.halve(now - 1)  # sent before the last halving
        assert (running, slots.limit) == (8, 4)
        await asyncio.gather(*tasks)
        for expected in (2, 1, 1):
            await slots.halve(float("inf"))
            assert slots.limit == expected
        most = 0
        await asyncio.gather(*(work(slots) for _ in range(4)))
        assert most == 1
        await asyncio.sleep(0.3)
        most = 0
        await asyncio.gather(*(work(slots) for _ in range(12)))
        assert (slots.limit, most) == (8, 8)
        slots.close()

    asyncio.run(main())


def test_a_sub_agent_that_is_refused_slows_the_swarm():
    def answer(messages, tools):
        rounds = sum(one["role"] == "assistant" for one in messages)
        if messages[0]["content"] == "Work.":
            if not refused:
                refused.append(True)
                raise agents.BusyError("slower", too_many=True, after=0.0)
            return agents.Reply("found")
        made = [("create_subagent", {"name": "a", "system_prompt": "Work."})]
        if rounds == 1:
            made = [("assign_task", {"agent": "a", "prompt": str(n)}) for n in range(6)]
        calls = tuple(agents.Call("", name, json.dumps(values)) for name, values in made)
        return agents.Reply(None, calls=calls) if rounds < 2 else agents.Reply("done")

    refused = []
    swarm = agents.swarm(agents.ScriptedModel(answer), limits=agents.Limits(concurrency=4))
    done = asyncio.run(swarm.run("task"))
    (event,) = [one for one in done.trace.events if one["event"] == "retry"]
    assert (event["agent"], event["error"], event["concurrency"]) == ("a#1", "slower", 2)
    assert done.answer == "done" and len(done.stages[1][1]) == 6
