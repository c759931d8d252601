"""The loop of an agent with a scripted model: order, limits, the words of every failure, cancellation."""

import asyncio
import hashlib
import json
import subprocess
import sys
import time

import jsonschema
import pytest

from kimi_jax import agents
from kimi_jax.agents.loop import GO_ON, LAST_STEP

USAGE = agents.Usage(10, 5, 2)


def say(text, **fields):
    return agents.Reply(text, usage=USAGE, **fields)


def call(name, *arguments, ids=None, **fields):
    texts = [one if isinstance(one, str) else json.dumps(one) for one in arguments]
    calls = tuple(agents.Call(f"chatcmpl-tool-{n}", name, text) for n, text in enumerate(texts))
    return agents.Reply(None, reasoning="so", calls=calls, usage=USAGE, **fields)


@agents.tool
def double(n: int) -> int:
    """Doubles a number."""
    return 2 * n


def run(script, tools=(double,), **settings):
    return asyncio.run(agents.Agent(agents.ScriptedModel(script), tools, **settings).run("task"))


def results(done):
    return [message["content"] for message in done.messages if message["role"] == "tool"]


def test_a_call_is_run_and_its_result_goes_back_before_the_answer():
    done = run([call("double", {"n": 21}), say("42")])
    assert (done.answer, done.stop, done.steps, done.critical_steps) == ("42", "answer", 2, 2)
    assert results(done) == ["42"] and done.usage == agents.Usage(20, 10, 4)
    assert done.messages[1]["reasoning_content"] == "so"


def test_instant_mode_sends_no_reasoning_back():
    done = run([call("double", {"n": 1}), say("2")], mode="instant")
    assert all("reasoning_content" not in message for message in done.messages)


def test_ids_of_another_form_are_numbered_over_the_conversation_and_good_ones_stay():
    good = agents.Reply(None, calls=(agents.Call("functions.double:2", "double", '{"n": 3}'),))
    done = run([call("double", {"n": 1}, {"n": 2}), good, call("double", {"n": 4}), say("")])
    ids = [message["tool_call_id"] for message in done.messages if message["role"] == "tool"]
    assert ids == [f"functions.double:{n}" for n in range(4)]


def test_results_come_back_in_the_order_of_the_calls_that_ran_at_once():
    async def wait(n: int) -> int:
        await barrier.wait()
        await asyncio.sleep(0.005 * (5 - n))
        ended.append(n)
        return n

    barrier, ended = asyncio.Barrier(5), []
    done = run([call("wait", *({"n": n} for n in range(5))), say("done")], [agents.tool(wait)])
    assert results(done) == list("01234") and ended == [4, 3, 2, 1, 0]


async def fail(text: str) -> str:
    raise KeyError(text)


async def sleep_long(text: str) -> str:
    await asyncio.sleep(100)
    return text


async def interrupt(text: str) -> str:
    raise asyncio.CancelledError(text)


SLOW = agents.Tool("slow", "", agents.tool(sleep_long).parameters, sleep_long, timeout=0.02)


@pytest.mark.parametrize(
    ("name", "arguments", "seen"),
    [
        ("fail", {"text": "x"}, "Error: KeyError: 'x'"),
        ("fail", {"text": "x" * 3000}, ("Error: KeyError: '" + "x" * 3000)[:2000]),
        ("interrupt", {"text": "x"}, "Error: CancelledError: x"),
        (
            "double",
            '{"n": ',
            "Error: the arguments of double are not JSON (Expecting value: line 1 column 7 (char 6))",
        ),
        ("double", '{"n": NaN}', "Error: the arguments of double are not JSON (holds NaN, which is not JSON)"),
        ("double", {"n": "1"}, "Error: $.n: '1' is not of type 'integer'"),
        ("double", "", "Error: $: 'n' is a required property"),
        ("double", [], "Error: $: [] is not of type 'object'"),
        ("triple", {}, "Error: no tool 'triple'; there are double, fail, interrupt, slow"),
        ("slow", {"text": "x"}, "Error: slow took longer than 0.02 s"),
    ],
)
def test_a_failed_call_is_told_in_words_and_the_run_goes_on(name, arguments, seen):
    tools = [double, agents.tool(fail), agents.tool(interrupt), SLOW]
    done = run([call(name, arguments), say("went on")], tools)
    assert results(done) == [seen] and done.answer == "went on"
    assert next(one for one in done.trace.events if one["event"] == "result")["ok"] is False


def test_the_stack_of_a_raising_tool_is_in_the_trace_alone():
    done = run([call("fail", {"text": "x"}), say("")], [agents.tool(fail)])
    result = next(one for one in done.trace.events if one["event"] == "result")
    assert "raise KeyError(text)" in result["stack"] and "raise" not in results(done)[0]


def test_a_long_result_is_cut_in_its_middle_and_whole_in_a_file(tmp_path):
    def long() -> str:
        return "a" * 60_000 + "b" * 60_000

    model = agents.ScriptedModel([call("long", {}), say("")])
    trace = agents.Trace(tmp_path / "run.jsonl")
    done = asyncio.run(agents.Agent(model, [agents.tool(long)]).run("task", trace=trace))
    (file,) = tmp_path.glob("*.txt")
    middle = f"\n[... 20000 characters left out, all of it in {file}]\n"
    assert results(done) == ["a" * 50_000 + middle + "b" * 50_000] and file.read_text() == long()


def test_the_same_call_is_refused_the_fourth_time_whatever_the_order_of_its_arguments():
    def add(a: int, b: int) -> int:
        return a + b

    same = ['{"a": 1, "b": 2}', '{"b": 2, "a": 1}'] * 2
    done = run([*(call("add", one) for one in same), say("")], [agents.tool(add)])
    assert results(done) == ["3"] * 3 + ["Error: this call was made three times before; its result does not change"]
    assert [one.get("loop") for one in done.trace.events if one["event"] == "result"][-1] is True


@pytest.mark.parametrize("limit", ["tool_calls", "calls"])
def test_calls_beyond_the_budget_are_refused_and_the_next_message_with_calls_ends_the_run(limit):
    refused = "Error: the budget of 2 tool calls is spent; answer with what you have"
    first, limits = call("double", {"n": 1}, {"n": 2}, {"n": 3}), agents.Limits(**{limit: 2})
    done = run([first, call("double", {"n": 4})], limits=limits)
    assert results(done) == ["2", "4", refused] and (done.stop, done.steps) == ("tool_calls", 2)
    done = run([first, say("6")], limits=limits)
    assert (done.stop, done.answer) == ("answer", "6")


def test_the_last_step_has_no_tools_and_is_announced():
    def answer(messages, tools):
        offered.append(len(tools))
        return call("double", {"n": len(messages)})

    offered = []
    done = run(answer, limits=agents.Limits(steps=3))
    assert offered == [1, 1, 0] and (done.stop, done.steps) == ("steps", 3)
    assert done.messages[-2] == {"role": "user", "content": LAST_STEP}


def test_reasoning_cut_by_the_limit_of_tokens_is_asked_to_go_on_once():
    cut = agents.Reply(None, reasoning="hm", finish="length")
    done = run([cut, say("so")])
    assert (done.stop, done.answer) == ("answer", "so") and done.messages[2]["content"] == GO_ON
    assert run([cut, cut]).stop == "length"


def test_limits_of_tokens_critical_steps_and_time_end_a_run_with_what_there_is():
    def answer(messages, tools):
        return agents.Reply("so far", calls=call("double", {"n": len(messages)}).calls, usage=USAGE)

    for limits, stop, steps in [
        (agents.Limits(tokens=30), "tokens", 3),
        (agents.Limits(critical_steps=4), "critical_steps", 4),
    ]:
        done = run(answer, limits=limits)
        assert (done.stop, done.steps, done.answer) == (stop, steps, "so far")
    done = run([call("sleep_long", {"text": ""})], [agents.tool(sleep_long)], limits=agents.Limits(time=0.02))
    assert (done.stop, done.steps) == ("time", 1)


def test_a_model_that_raises_ends_the_run_with_its_exception():
    done = run([])
    assert done.stop == "model_error" and "no further reply" in str(done.error)

    def too_long(messages, tools):
        raise agents.ContextLengthError("9 tokens")

    assert run(too_long).stop == "tokens"


def test_cancelling_reaches_every_tool_and_leaves_no_task_and_a_complete_trace():
    async def hang(n: int) -> None:
        started.append(n)
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(n)

    async def main():
        model = agents.ScriptedModel([call("hang", *({"n": n} for n in range(5)))])
        task = asyncio.create_task(agents.Agent(model, [agents.tool(hang)]).run("task", trace=trace))
        while len(started) < 5:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    started, ended, trace = [], [], agents.Trace()
    asyncio.run(main())
    assert sorted(ended) == list(range(5))
    assert (trace.events[-1]["event"], trace.events[-1]["why"]) == ("stop", "cancelled")


def test_three_hundred_steps_take_under_two_seconds():
    begin = time.process_time()
    script = [*(call("double", {"n": n}) for n in range(299)), say("done")]
    assert run(script, limits=agents.Limits(steps=301)).steps == 300
    assert time.process_time() - begin < 2


def test_misuse_is_refused():
    model = agents.ScriptedModel([])
    with pytest.raises(ValueError, match="two tools have the name 'double'"):
        agents.Agent(model, [double, double])
    # In tests the type checker would refuse the mode earlier
    unchecked = object.__new__(agents.Agent)
    vars(unchecked).update(model=model, tools=(), mode="fast")
    with pytest.raises(ValueError, match=r"^mode is 'fast', expected 'instant' or 'thinking'$"):
        unchecked.__post_init__()
    with pytest.raises(jsonschema.SchemaError, match="'objekt' is not valid"):
        agents.Agent(model, [agents.Tool("x", "", {"type": "objekt"}, print)])
    with pytest.raises(FileExistsError):
        agents.Trace(__file__)


def test_a_file_of_a_trace_has_the_events_in_order(tmp_path):
    trace = agents.Trace(tmp_path / "run.jsonl")
    model = agents.ScriptedModel([call("double", {"n": 21}), say("\ud800")])
    asyncio.run(agents.Agent(model, [double]).run("task", trace=trace))
    events = [json.loads(line) for line in trace.path.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["run", "step", "message", "call", "result", "step", "message", "stop"]
    assert events[-1]["usage"] == {"prompt": 20, "cached": 10, "completion": 4}


def test_agents_of_a_server_load_neither_jax_nor_mcp():
    code = "import sys, kimi_jax.agents; sys.exit(bool({'jax', 'mcp'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_is_in_the_trace_by_its_digest_and_in_a_file_beside_it(tmp_path, kept):
    url = "data:image/png;base64,cGljdHVyZQ=="
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    trace = agents.Trace(tmp_path / "run.jsonl" if kept else None)
    model = agents.ScriptedModel([say("data:image/png;base64,?")])
    done = asyncio.run(agents.Agent(model).run(parts, trace=trace))
    events = [json.loads(line) for line in trace.path.read_text().splitlines()] if kept else trace.events
    digest = hashlib.sha256(b"picture").hexdigest()
    assert events[0]["task"][0] == {"type": "image_url", "image_url": {"url": f"sha256:{digest}"}}
    assert events[-1]["answer"] == "data:image/png;base64,?" and done.messages[0]["content"] == parts
    assert [file.read_bytes() for file in tmp_path.glob("*.png")] == [b"picture"] * kept
