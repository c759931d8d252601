"""Heavy: runs side by side with their seeds, the merge of their answers, failures, and the split budget."""

import asyncio
import json

import pytest

from kimi_jax import agents
from kimi_jax.agents.heavy import ANSWER_LENGTH, MERGE


class Seeded(agents.ScriptedModel):
    """Answers a run by what `answers` has for the order in which it asked; later runs answer earlier."""

    def __init__(self, answers, context=None):
        self.answers, self.seeds, self.merges, self.context = answers, [], [], context

    async def __call__(self, messages, tools, *, mode, max_tokens, seed=None):
        content = messages[-1]["content"]
        if MERGE in (content if isinstance(content, str) else content[-1]["text"]):
            self.merges.append((content, tools, mode))
            return agents.Reply("merged", usage=agents.Usage(100, 0, 1))
        number = len(self.seeds)
        self.seeds.append(seed)
        await asyncio.sleep(0.01 * (len(self.answers) - number))
        if isinstance(self.answers[number], Exception):
            raise self.answers[number]
        return agents.Reply(self.answers[number], usage=agents.Usage(10, 5, 1))

    def measure(self, messages, tools, *, mode, last):
        return None if self.context is None else (len(messages[-1]["content"]), self.context)


def heavy(answers, n=8, task="task", context=None, **settings):
    model = Seeded(answers, context)
    return asyncio.run(agents.heavy(agents.Agent(model, **settings), task, n)), model


def test_seven_of_eight_are_merged_in_the_order_of_their_seeds():
    answers = [*(f"Answer {n % 2}." for n in range(7)), OSError("gone")]
    answers[2] = "answer  0"
    done, model = heavy(answers)
    assert [run.answer for run in done.runs] == [*answers[:7], ""] and done.runs[7].stop == "model_error"
    assert (done.answer, done.agreement, done.critical_steps) == ("merged", 4, 2)
    assert done.usage == agents.Usage(170, 35, 8)
    assert len(set(model.seeds)) == 8 and heavy(answers)[1].seeds == model.seeds
    ((prompt, tools, mode),) = model.merges
    numbered = [*(f"Answer {n}:\n{text}" for n, text in enumerate(answers[:7], 1))]
    failed = "Answer 8:\n(none: this attempt ended by model_error)"
    assert prompt == "\n\n".join(["task", MERGE, *numbered, failed]) and (tools, mode) == ([], "thinking")


def test_all_failed_is_an_error():
    with pytest.raises(RuntimeError, match="none of 2 runs has an answer: model_error, model_error") as caught:
        heavy([OSError("gone"), OSError("too")], 2)
    assert str(caught.value.__cause__) == "gone"
    with pytest.raises(ValueError, match="n is 0, expected at least 1 run"):
        heavy([], 0)


def test_long_answers_are_cut_to_fit_and_a_task_with_pictures_stays_whole():
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, {"type": "text", "text": "?"}]
    _, model = heavy(["a" * 60_000, "b"], 2, parts)
    prompt = model.merges[0][0]
    assert prompt[:2] == parts and f"{'a' * ANSWER_LENGTH}\n[... 10000 characters left out]" in prompt[2]["text"]
    _, model = heavy(["a" * 60_000, "b"], 2, context=10_000, limits=agents.Limits(max_tokens=2_000))
    assert 3_000 < len(model.merges[0][0]) <= 8_000


def test_the_budget_of_calls_of_swarms_is_split_evenly_and_the_trace_is_one_tree():
    ran = []

    @agents.tool
    def look(key: str) -> str:
        """Looks up."""
        ran.append(key)
        return key

    def answer(messages, tools):
        rounds = sum(one["role"] == "assistant" for one in messages)
        made = [("create_subagent", {"name": "a", "system_prompt": "Work."})]
        if messages[0]["content"] == "Work.":
            made = [("look", {"key": str(n)}) for n in range(4)]
        elif rounds == 1:
            made = [("assign_task", {"agent": "a", "prompt": "go"})]
        elif rounds == 2 or MERGE in messages[-1]["content"]:
            return agents.Reply("done")
        if messages[0]["content"] == "Work." and rounds:
            return agents.Reply("found")
        return agents.Reply(None, calls=tuple(agents.Call("", name, json.dumps(values)) for name, values in made))

    trace = agents.Trace()
    swarm = agents.swarm(agents.ScriptedModel(answer), [look], limits=agents.Limits(tool_calls=5))
    done = asyncio.run(agents.heavy(swarm, "task", 2, trace=trace))
    assert sorted(ran) == ["0", "0", "1", "1", "2"] and done.critical_steps == 3 + 2 + 1
    names = {event["agent"]: event["parent"] for event in trace.events if event["event"] == "run"}
    assert names == {"run#0": "main", "run#1": "main", "run#0/a#1": "run#0", "run#1/a#1": "run#1", "main": None}
    assert (trace.events[-1]["event"], trace.events[-1]["agent"]) == ("stop", "main")
