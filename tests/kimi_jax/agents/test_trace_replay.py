"""Traces: their schema, replay, a process that dies, and events as they happen."""

import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap

import jsonschema
import pytest

from kimi_jax import agents

TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
SECONDS, MAYBE = {"type": "number", "minimum": 0}, {"type": ["integer", "null"]}
USAGE = {"type": "object", "required": ["prompt", "cached", "completion"], "additionalProperties": COUNT}
MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {"role": {"enum": ["assistant", "user"]}}}
CONTENT = {"type": ["string", "array"]}
KINDS = {
    "run": {
        "model": TEXT,
        "mode": {"enum": ["instant", "thinking"]},
        "limits": {"type": "object"},
        "tools": {"type": "array"},
        "system": {"type": ["string", "null"]},
        "task": CONTENT,
    },
    "step": {
        "n": COUNT,
        "s": SECONDS,
        "finish": TEXT,
        "prompt_tokens": COUNT,
        "cached_tokens": COUNT,
        "completion_tokens": COUNT,
    },
    "message": {"message": MESSAGE},
    "call": {"id": TEXT, "name": TEXT, "arguments": TEXT},
    "result": {"id": TEXT, "ok": {"type": "boolean"}, "s": SECONDS, "content": CONTENT},
    "spawn": {"id": TEXT, "configuration": TEXT},
    "context": {"strategy": TEXT, "before": MAYBE, "after": MAYBE, "cached_before": COUNT},
    "retry": {"error": TEXT, "wait": SECONDS, "concurrency": COUNT},
    "stop": {"why": TEXT, "answer": TEXT, "steps": COUNT, "critical_steps": COUNT, "usage": USAGE},
}
MORE = {"result": {"error": TEXT, "stack": TEXT, "loop": {"const": True}}}
COMMON = {"t": SECONDS, "agent": TEXT, "parent": {"type": ["string", "null"]}}
SCHEMA = {
    "oneOf": [
        {
            "type": "object",
            "properties": {**COMMON, "event": {"const": kind}, **fields, **MORE.get(kind, {})},
            "required": [*COMMON, "event", *fields],
            "additionalProperties": False,
        }
        for kind, fields in KINDS.items()
    ]
}


@agents.tool
def look(key: str) -> str:
    """Looks a key up."""
    return key * 60_000 if key == "ab" else key


def calls(*made):
    return agents.Reply(None, "so", tuple(agents.Call("", name, json.dumps(values)) for name, values in made))


class Eventful(agents.ScriptedModel):
    """Directs a sub-agent whose run has each kind of event, by what it is asked."""

    def __init__(self):
        self.busy = self.full = False

    async def __call__(self, messages, tools, *, mode, max_tokens, seed=None):
        rounds = sum(one["role"] == "assistant" for one in messages)
        if messages[0]["content"] == "Look.":
            if rounds == 1 and not self.busy:
                self.busy = True
                raise agents.BusyError("wait", too_many=True, after=0.0)
            if rounds == 2 and not self.full:
                self.full = True
                raise agents.ContextLengthError("full")
            look_up, fail = calls(("look", {"key": "ab"})), calls(("look", {"key": 3}), ("find", {}))
            return (look_up, fail, agents.Reply(None, "hm", finish="length"), agents.Reply("found"))[rounds]
        create = calls(("create_subagent", {"name": "a", "system_prompt": "Look."}))
        assign = calls(("assign_task", {"agent": "a", "prompt": "the keys"}))
        return (create, assign, agents.Reply("all"))[rounds]


def swarm(model):
    return agents.Agent(model, [look], "Direct.", run_tools=agents.swarm(model).run_tools, context="hide-tool-results")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    done = asyncio.run(swarm(Eventful()).run("task", trace=agents.Trace(path)))
    assert (done.answer, done.stop, done.critical_steps) == ("all", "answer", 7)
    return path


def test_every_line_fits_the_schema_and_every_kind_occurs(recorded):
    events = list(agents.read_trace(recorded))
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for event in events:
        validator.validate(event)
    assert {event["event"] for event in events} == set(KINDS)
    assert sorted(event["t"] for event in events) == [event["t"] for event in events]
    assert (events[-1]["event"], events[-1]["agent"]) == ("stop", "main")


def outline(events):
    return sorted(
        json.dumps({key: value for key, value in event.items() if key not in ("t", "s", "content", "model")})
        for event in events
        if event["event"] not in ("retry", "context")
    )


def test_a_run_is_replayed_to_the_same_trace(recorded, tmp_path):
    model = agents.ScriptedModel.from_trace(recorded)

    class AsFull(agents.ScriptedModel):
        async def __call__(self, messages, tools, **settings):
            hidden = any("removed" in str(one["content"]) for one in messages)
            rounds = sum(one["role"] == "assistant" for one in messages)
            if messages[0]["content"] == "Look." and rounds == 2 and not hidden:
                raise agents.ContextLengthError("full")
            return await model(messages, tools, **settings)

    trace = agents.Trace(tmp_path / "again.jsonl")
    done = asyncio.run(swarm(AsFull([])).run("task", trace=trace))
    assert done.error is None and outline(agents.read_trace(trace.path)) == outline(agents.read_trace(recorded))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "Command."}, r"message 0 of main differs: the trace has .*Direct\..*, the prompt .*Command\."),
        ({"task": "other"}, "message 1 of main differs: the trace has .*task.*, the prompt .*other"),
    ],
)
def test_the_first_prompt_that_differs_is_named(recorded, change, words):
    model = agents.ScriptedModel.from_trace(recorded)
    agent = agents.Agent(model, [look], change.get("system", "Direct."), run_tools=agents.swarm(model).run_tools)
    done = asyncio.run(agent.run(change.get("task", "task")))
    assert done.stop == "model_error"
    with pytest.raises(ValueError, match=words):
        raise done.error


def test_a_result_that_differs_is_named(tmp_path):
    numbers = iter(range(9))
    count = agents.Tool("count", "", {"type": "object"}, lambda: next(numbers))
    trace = agents.Trace(tmp_path / "run.jsonl")
    script = [calls(("count", {})), agents.Reply("done")]
    asyncio.run(agents.Agent(agents.ScriptedModel(script), [count]).run("task", trace=trace))
    done = asyncio.run(agents.Agent(agents.ScriptedModel.from_trace(trace.path), [count]).run("task"))
    assert "message 2 of main differs" in str(done.error) and "'text': '1'" in str(done.error)


def test_a_trace_of_a_process_that_was_killed_is_read_to_its_last_whole_line(tmp_path):
    path = tmp_path / "run.jsonl"
    code = f"""
        import asyncio, os, signal
        from kimi_jax import agents
        def die() -> str:
            with open({str(path)!r}, "a") as file:
                file.write('{{"t": 3, "ag')
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        call = agents.Reply(None, calls=(agents.Call("", "die", "{{}}"),))
        agent = agents.Agent(agents.ScriptedModel([call]), [agents.tool(die)])
        asyncio.run(agent.run("task", trace=agents.Trace({str(path)!r})))
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert died.returncode == -9
    assert [event["event"] for event in agents.read_trace(path)] == ["run", "step", "message", "call"]
    path.write_text("{}\nno event\n{}\n")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        list(agents.read_trace(path))


def test_the_environment_does_not_enter_a_trace(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    model = agents.OpenAIModel.at("http://127.0.0.1:9/v1", "kimi", "sk-argument")
    monkeypatch.setattr("kimi_jax.agents.loop.BACKOFF", 0.0)

    async def main():
        done = await agents.Agent(model, [look]).run("task", trace=agents.Trace(tmp_path / "run.jsonl"))
        await model.client.close()
        return done

    done = asyncio.run(main())
    assert done.stop == "model_error" and isinstance(done.error, agents.BusyError)
    text = (tmp_path / "run.jsonl").read_text()
    assert text.count('"retry"') == 3 and "sk-" not in text


def test_a_stream_has_the_events_of_the_trace_and_closing_it_cancels_the_run(tmp_path):
    async def hang(n: int) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(n)

    async def main():
        model = agents.ScriptedModel([calls(("look", {"key": "a"})), agents.Reply("done")])
        path = tmp_path / "run.jsonl"
        events = [event async for event in agents.Agent(model, [look]).stream("task", path=path)]
        assert events == list(agents.read_trace(path)) and events[-1]["why"] == "answer"
        model = agents.ScriptedModel([calls(("hang", {"n": 1}))])
        stream = agents.Agent(model, [agents.tool(hang)]).stream("task")
        async with contextlib.aclosing(stream):
            async for event in stream:
                if event["event"] == "call":
                    await asyncio.sleep(0)
                    break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    ended = []
    asyncio.run(main())
    assert ended == [1]
