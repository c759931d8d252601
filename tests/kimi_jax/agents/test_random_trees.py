"""Random trees of calls, failures and delays keep the order of results, the budgets, and the critical steps."""

import asyncio
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax import agents

CALL = st.tuples(st.sampled_from(["work", "fail", "none", "bad"]), st.integers(0, 3))
ROUNDS = st.lists(st.lists(CALL, min_size=1, max_size=4), max_size=4)
TREE = st.lists(st.lists(ROUNDS, min_size=1, max_size=3), max_size=3)  # of each stage, each sub-agent's rounds


def reply(made):
    return agents.Reply(None, calls=tuple(agents.Call("", name, json.dumps(values)) for name, values in made))


@settings(max_examples=25, deadline=None)
@given(TREE, st.integers(0, 30), st.integers(1, 4), st.integers(1, 6))
def test_results_are_in_order_and_budgets_hold(tree, tool_calls, concurrency, sub_steps):
    running, most, ran, serial = 0, 0, [], iter(range(10_000))

    @agents.tool
    async def work(delay: int, n: int) -> int:
        """Waits."""
        ran.append(n)
        for _ in range(delay):
            await asyncio.sleep(0)
        return n

    @agents.tool
    async def fail(delay: int, n: int) -> int:
        """Waits and fails."""
        await work.run(delay, n)
        raise ValueError(n)

    def worker(messages):
        nonlocal running, most
        rounds = sum(one["role"] == "assistant" for one in messages)
        plan = json.loads(messages[1]["content"])
        if rounds == 0:
            running += 1
            most = max(most, running)
        if rounds >= min(len(plan), sub_steps - 1):
            running -= 1
            return agents.Reply("found")
        calls = []
        for name, delay in plan[rounds]:
            values = {"delay": delay, "n": next(serial)}
            calls.append((name, values if name != "bad" else {"delay": "x"}))
        return reply([("work" if name == "bad" else name, values) for name, values in calls])

    def answer(messages, tools):
        if messages[0]["content"] == "Work.":
            return worker(messages)
        rounds = sum(one["role"] == "assistant" for one in messages)
        if rounds == 0:
            return reply([("create_subagent", {"name": "a", "system_prompt": "Work."})])
        if rounds > len(tree):
            return agents.Reply("done")
        return reply([("assign_task", {"agent": "a", "prompt": json.dumps(one)}) for one in tree[rounds - 1]])

    limits = agents.Limits(tool_calls=tool_calls, concurrency=concurrency, sub_steps=sub_steps, steps=100)
    trace = agents.Trace()
    swarm = agents.swarm(agents.ScriptedModel(answer), [work, fail], limits=limits)
    done = asyncio.run(swarm.run("task", trace=trace))
    assert done.answer == "done" and len(ran) <= tool_calls
    # A sub-agent whose calls were refused ends with its next message of calls, which `worker` does not see
    refused = any("budget" in str(event.get("content")) for event in trace.events)
    assert refused or (most <= concurrency and running == 0)
    total = sum(main + sum(launched) for main, launched in done.stages)
    assert done.steps <= done.critical_steps <= total == sum(event["event"] == "step" for event in trace.events)
    for event in trace.events:
        if event["event"] == "result" and event["content"].isdigit():
            asked = next(
                one["arguments"]
                for one in trace.events
                if one["event"] == "call" and (one["agent"], one["id"]) == (event["agent"], event["id"])
            )
            assert json.loads(asked)["n"] == int(event["content"])
    ids = [one["tool_call_id"] for one in done.messages if one["role"] == "tool"]
    assert ids == [call["id"] for one in done.messages for call in one.get("tool_calls", ())]
