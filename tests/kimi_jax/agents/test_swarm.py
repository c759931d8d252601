"""A swarm with scripted models: isolation, critical steps, shared budgets, concurrency, cancellation."""

import asyncio
import json

import pytest

from kimi_jax import agents


def calls(*made):
    return agents.Reply(None, calls=tuple(agents.Call("", name, json.dumps(values)) for name, values in made))


CREATE = calls(("create_subagent", {"name": "finder", "system_prompt": "You look up."}))


def assign(*prompts):
    return calls(*(("assign_task", {"agent": "finder", "prompt": prompt}) for prompt in prompts))


def scripted(main, worker):
    """Returns a model that answers the orchestrator from a list, and sub-agents with what `worker` makes."""
    replies = iter(main)

    def answer(messages, tools):
        if messages[0]["content"] == "You look up.":
            return worker(messages, tools)
        return next(replies)

    return agents.ScriptedModel(answer)


@agents.tool
def look(key: str) -> str:
    """Looks a key up."""
    return key


def looks(times):
    """Returns a worker that makes so many look-ups, one a message, and then answers."""

    def worker(messages, tools):
        made, prompt = sum(one["role"] == "tool" for one in messages), messages[1]["content"]
        return calls(("look", {"key": f"{prompt}/{made}"})) if made < times else agents.Reply(f"{prompt}: found")

    return worker


def run(main, worker, tools=(look,), **limits):
    return asyncio.run(agents.swarm(scripted(main, worker), tools, limits=agents.Limits(**limits)).run("task"))


def results(done):
    return [message["content"] for message in done.messages if message["role"] == "tool"]


def test_critical_steps_count_the_longest_sub_agent_of_each_stage():
    twelve = [f"item {n}" for n in range(12)]
    done = run([CREATE, assign(*twelve), agents.Reply("all")], looks(2))
    assert done.stages == [(1, []), (1, [3] * 12), (1, [])] and done.critical_steps == 6
    assert results(done)[1:] == [f"{item}: found" for item in twelve]

    def uneven(messages, tools):
        return looks(6 if messages[1]["content"] == "item 5" else 2)(messages, tools)

    assert run([CREATE, assign(*twelve), agents.Reply("all")], uneven).critical_steps == 10
    alone = [*(calls(("look", {"key": str(n)})) for n in range(24)), agents.Reply("all")]
    assert run(alone, looks(0)).critical_steps == 25


def test_sub_agents_see_their_prompt_alone_and_no_tools_of_the_swarm():
    def worker(messages, tools):
        assert [one["content"] for one in messages] == ["You look up.", "one"]
        assert [one["function"]["name"] for one in tools] == ["look"]
        return agents.Reply("fine")

    assert results(run([CREATE, assign("one"), agents.Reply("")], worker))[1] == "fine"


def test_one_that_fails_or_meets_its_limit_does_so_alone():
    def worker(messages, tools):
        prompt = messages[1]["content"]
        if prompt == "bad":
            raise OSError("gone")
        return looks(9 if prompt == "long" else 1)(messages, tools)

    good = [f"good {n}" for n in range(10)]
    done = run([CREATE, assign("bad", "long", *good), agents.Reply("")], worker, sub_steps=2)
    found = [f"{name}: found" for name in good]
    assert results(done)[1:] == ["Error: OSError: gone", "[stopped by its limit: steps]", *found]
    assert sorted(done.stages[1][1]) == [0, *[2] * 11]


def test_one_that_takes_too_long_is_cancelled_alone():
    async def work(key: str) -> str:
        try:
            await asyncio.sleep(100 if key == "slow" else 0)
        except asyncio.CancelledError:
            cancelled.append(key)
            raise
        return key

    def worker(messages, tools):
        return calls(("work", {"key": messages[1]["content"]})) if len(messages) == 2 else agents.Reply("done")

    cancelled = []
    done = run([CREATE, assign("slow", "quick"), agents.Reply("")], worker, [agents.tool(work)], sub_time=0.1)
    assert results(done)[1:] == ["Error: assign_task took longer than 0.1 s", "done"] and cancelled == ["slow"]
    assert done.stop == "answer" and sorted(done.stages[1][1]) == [1, 2]


def test_names_are_unique_and_known_and_the_number_of_sub_agents_is_bounded():
    wrong = calls(("assign_task", {"agent": "x", "prompt": ""}))
    done = run([wrong, CREATE, CREATE, assign("a", "b"), agents.Reply("")], looks(0), subagents=1)
    assert results(done) == [
        "Error: no sub-agent 'x'; there are none yet",
        "The sub-agent 'finder' can be given tasks now.",
        "Error: the sub-agent 'finder' exists already",
        "a: found",
        "Error: the budget of 1 sub-agents is spent; answer with what you have",
    ]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_run_at_once_than_concurrency(concurrency):
    running, most = 0, 0

    async def work(key: str) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return key

    def worker(messages, tools):
        return calls(("work", {"key": ""})) if len(messages) == 2 else agents.Reply("done")

    run([CREATE, assign(*map(str, range(12))), agents.Reply("")], worker, [agents.tool(work)], concurrency=concurrency)
    assert most == concurrency


@pytest.mark.parametrize(("look_ups", "refused"), [(15, False), (16, True)])
def test_the_budget_of_calls_is_exact_under_a_hundred_sub_agents(look_ups, refused):
    ran = []

    async def look(key: str) -> str:
        await asyncio.sleep(0)
        ran.append(key)
        return key

    main = [CREATE, assign(*map(str, range(100))), agents.Reply("all")]
    done = run(main, looks(look_ups), [agents.tool(look)])
    told = [one for one in done.trace.events if one["event"] == "result" and not one["ok"]]
    assert len(ran) == 1_500 and done.stop == "answer" and bool(told) == refused
    assert {one["content"] for one in told} <= {
        "Error: the budget of 1500 tool calls is spent; answer with what you have"
    }


def test_cancelling_in_the_middle_ends_every_sub_agent():
    started, ended = [], []

    async def hang(key: str) -> None:
        started.append(key)
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(key)

    def worker(messages, tools):
        return calls(("hang", {"key": messages[1]["content"]}))

    async def main():
        model = scripted([CREATE, assign(*map(str, range(20)))], worker)
        task = asyncio.create_task(agents.swarm(model, [agents.tool(hang)]).run("task", trace=trace))
        while len(started) < 20:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    trace = agents.Trace()
    asyncio.run(main())
    stops = [one for one in trace.events if one["event"] == "stop"]
    assert len(ended) == 20 and len(stops) == 21 and {one["why"] for one in stops} == {"cancelled"}
    assert stops[-1]["agent"] == "main"
