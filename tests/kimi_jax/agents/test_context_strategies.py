"""Strategies for a full context: hand-made histories, counted by a real template, and their place in the loop."""

import asyncio
import json

import pytest
from answer_cases import call, section

from kimi_jax import agents, small
from kimi_jax.agents.context import HIDDEN, discard_all, hide_tool_results, prompt_limit
from kimi_jax.agents.loop import LAST_STEP
from kimi_jax.processor import Processor

LOOK = agents.Tool("look", "", {"type": "object"}, lambda **_: "word " * 150, timeout=None)


@pytest.fixture(scope="module")
def processor():
    return Processor.from_folder(small.path("k25-digits"))


def history(rounds):
    """Returns a conversation of rounds of two calls each, with long results."""
    messages = [{"role": "system", "content": "You look up."}, {"role": "user", "content": "Where is it?"}]
    for number in range(rounds):
        ids = [f"functions.look:{2 * number + n}" for n in range(2)]
        made = [{"id": one, "type": "function", "function": {"name": "look", "arguments": "{}"}} for one in ids]
        messages.append({"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": made})
        messages += [{"role": "tool", "tool_call_id": one, "content": f"result {one} " * 50} for one in ids]
    return messages


def test_hidden_results_are_those_before_the_latest_round_and_calls_stay_whole():
    before = history(3)
    after = hide_tool_results(before)
    assert [one["content"] for one in after if one["role"] == "tool"] == [HIDDEN] * 4 + [
        one["content"] for one in before[-2:]
    ]
    assert [one for one in after if one["role"] != "tool"] == [one for one in before if one["role"] != "tool"]
    assert hide_tool_results(history(1)) == history(1) and hide_tool_results(history(0)) == history(0)
    assert before == history(3)


def test_discarding_leaves_the_system_prompt_the_task_and_the_announcement_of_the_last_step():
    last = {"role": "user", "content": LAST_STEP}
    assert discard_all(history(3)) == history(0) and discard_all(history(0)) == history(0)
    assert discard_all([*history(3), last]) == [*history(0), last]


def test_both_make_the_prompt_of_the_real_template_as_short_as_its_parts(list_engine, processor):
    model = agents.EngineModel(list_engine(processor, max_length=9_999), processor)

    def count(messages):
        return model.measure(messages, [LOOK.declaration], mode="thinking", last=agents.Usage())[0]

    assert model.measure(history(0), [], mode="thinking", last=agents.Usage())[1] == 9_999
    whole, hidden, discarded = (count(change(history(3))) for change in (list, hide_tool_results, discard_all))
    placeholder = len(processor.tokenizer.encode(HIDDEN))
    gone = [len(processor.tokenizer.encode(one["content"])) for one in history(3)[2:-2] if one["role"] == "tool"]
    assert whole - hidden == sum(gone) - 4 * placeholder and discarded == count(history(0)) < hidden


@pytest.mark.parametrize(
    ("context", "max_tokens", "threshold", "limit"),
    [(262_144, 16_384, 0.85, 206_438), (1_280, 16_384, 0.85, 544), (1_000, 100, 1.0, 900)],
)
def test_the_limit_of_a_prompt_leaves_room_for_the_answer_but_half_of_the_share_at_most(
    context, max_tokens, threshold, limit
):
    assert prompt_limit(context, max_tokens, threshold) == limit


def run(list_engine, processor, context, rounds=3):
    made = [section(call(f"functions.look:{n}", json.dumps({"n": n}))) for n in range(rounds)]
    texts = [*(f"Hm.</think>{one}" for one in made), "So.</think>Here."]
    engine = list_engine(processor, *texts, max_length=2_000)
    agent = agents.Agent(
        agents.EngineModel(engine, processor), [LOOK], limits=agents.Limits(max_tokens=64), context=context
    )
    return asyncio.run(agent.run("Where?")), engine


@pytest.mark.parametrize("context", ["hide-tool-results", "discard-all"])
def test_the_loop_applies_a_strategy_before_the_prompt_is_too_long(list_engine, processor, context):
    done, engine = run(list_engine, processor, context)
    found = [event for event in done.trace.events if event["event"] == "context"]
    lengths = [len(one.tokens) for one in engine.requests]
    assert (done.answer, done.stop, done.steps) == ("Here.", "answer", 4) and found
    limit = prompt_limit(2_000, 64, 0.85)
    for event in found:
        assert event["strategy"] == context and event["before"] > limit >= event["after"] in lengths
        assert event["cached_before"] == 128
    assert max(lengths) <= limit
    ids = [event["id"] for event in done.trace.events if event["event"] == "call"]
    assert ids == [f"functions.look:{n}" for n in range(3)]  # the counts go on
    if context == "discard-all":
        assert [one["role"] for one in done.messages][:2] == ["user", "assistant"]


def test_keep_ends_the_run_where_the_prompt_does_not_fit(list_engine, processor):
    done, _ = run(list_engine, processor, "keep", rounds=6)
    assert done.stop == "tokens" and all(event["event"] != "context" for event in done.trace.events)


@pytest.mark.parametrize(("refusals", "stop"), [(1, "answer"), (2, "tokens")])
def test_a_server_that_refuses_the_length_is_asked_once_more_with_a_shorter_prompt(refusals, stop):
    def answer(messages, tools):
        if len(messages) < 5:
            return agents.Reply(None, calls=(agents.Call("", "look", json.dumps({"n": len(messages)})),))
        asked.append([one["content"] for one in messages if one["role"] == "tool"])
        if len(asked) <= refusals:
            raise agents.ContextLengthError("too long")
        return agents.Reply("done")

    asked = []
    done = asyncio.run(agents.Agent(agents.ScriptedModel(answer), [LOOK], context="hide-tool-results").run("task"))
    word = "word " * 150
    assert done.stop == stop and asked == [[word, word], [HIDDEN, word]]
    (event,) = [one for one in done.trace.events if one["event"] == "context"]
    assert (event["before"], event["after"]) == (None, None)


def test_misuse_is_refused():
    model = agents.ScriptedModel([])
    unchecked = object.__new__(agents.Agent)  # in tests the type checker would refuse the name earlier
    vars(unchecked).update(model=model, tools=(), mode="thinking", context="forget", threshold=0.85)
    with pytest.raises(ValueError, match=r"^context is 'forget', expected keep, hide-tool-results, discard-all$"):
        unchecked.__post_init__()
    with pytest.raises(ValueError, match=r"threshold is 1\.5, expected a share"):
        agents.Agent(model, threshold=1.5)
