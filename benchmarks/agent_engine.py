"""Agents on an engine: how much of a swarm's prompts comes from the prefix cache, and what that saves.

    python benchmarks/agent_engine.py swarm [--family k2.5|kimi-linear] [--agents 32]
    python benchmarks/agent_engine.py heavy [--family k2.5|kimi-linear] [--agents 8]
    python benchmarks/agent_engine.py pictures [--agents 12] [--out run.jsonl]

`swarm`: a random model of two layers of each kind, float32. A scripted orchestrator launches so many sub-agents, whose
messages the engine makes: all have one system prompt and tool, about 2,000 tokens, and a task of some 50. A grammar
holds each message to one call of the tool, the last to an answer. The swarm runs without the prefix cache, then with
it, and the messages of both must be the same. The cached share is that of all tokens of prompts: of first messages,
without the first sub-agent's, whose prompt nobody computed before, and of later ones.

`heavy`: so many runs of one task, whose prompt has some 2,000 tokens. Its prefill is the tokens of first messages that
were computed, as a multiple of the prompt.

`pictures`: k25-digits, which is trained. A scripted orchestrator hands each of so many pictures of digits that the
model has not seen to a sub-agent: it reads the number in every second one, and adds the two numbers in the others with
a tool. A task names its picture; the picture and the question are put in its place before the model sees it.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from agent_runs import call, cases, data_url

from kimi_jax import Engine, Processor, agents, small
from kimi_jax.engine.shard import Shard
from kimi_jax.server.masks import Masks
from kimi_jax.text import grammar

ROLE = "You look items up."
RULE = "The report names a place where each item was last seen and who has it now; read it before you answer."


class ForcedCalls(agents.EngineModel):
    """Holds each answer to one call of a tool, and the one after `calls` of them to a word: random weights know no
    other way to make a valid call."""

    def __init__(self, engine: Engine, processor: Processor, calls: int):
        super().__init__(engine, processor)
        config = processor.config
        self.calls, self.masks = calls, Masks(processor.tokenizer, config.text.vocab_size, config.stop_ids)

    def mask_provider(
        self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]], *, thinking: bool, max_tokens: int
    ) -> Any:
        """Returns the mask provider of the next answer."""
        strict = [{**one, "function": {**one["function"], "strict": True}} for one in tools]
        made = grammar.next_number(messages)
        choice = "required" if tools and made < self.calls else "none"
        content = grammar.choice_rule(["found", "lost"])
        written = grammar.write_grammar(
            self.processor.tokenizer, strict, choice, content=content, parallel=False, number=made
        )
        return self.masks.providers(written, thinking, 0, max_tokens, 1)[0]


class Directed:
    """Answers an orchestrator, whose prompt is that of `agents.swarm`, by a script, and its sub-agents with `workers`.

    The script defines one kind of sub-agent, with the system prompt `role`, gives it all `tasks` in one message, and
    answers with what comes back, a line each.
    """

    def __init__(self, workers: agents.ChatModel, role: str, tasks: Sequence[str]):
        self.workers, self.role, self.tasks = workers, role, tasks
        self.script = agents.ScriptedModel(self._direct)

    def __str__(self) -> str:
        return f"{self.workers} under a script"

    async def __call__(self, messages: Sequence[Any], tools: Sequence[Any], **settings: Any) -> agents.Reply:
        model = self.workers if messages[0]["content"] == self.role else self.script
        return await model(messages, tools, **settings)

    def measure(self, messages: Sequence[Any], tools: Sequence[Any], **settings: Any) -> None:
        """Returns None: no strategy for long contexts is asked for."""

    def _direct(self, messages: Sequence[Any], tools: Sequence[Any]) -> agents.Reply:
        results = [message["content"] for message in messages if message["role"] == "tool"]
        if not results:
            return agents.Reply(None, calls=(call("create_subagent", name="finder", system_prompt=self.role),))
        if len(results) == 1:
            return agents.Reply(
                None, calls=tuple(call("assign_task", agent="finder", prompt=one) for one in self.tasks)
            )
        return agents.Reply("\n".join(results[1:]))


@contextlib.contextmanager
def no_prefix_cache() -> Iterator[None]:
    """Lets no engine find pages that an earlier request filled, nor wait for a request that fills some."""
    with (
        mock.patch.object(Shard, "publish", lambda shard, sequence: None),
        mock.patch.object(Shard, "promise", lambda shard, sequence, usable, urgency: None),
    ):
        yield


@agents.tool
def look(place: int) -> str:
    """Looks at one of ten places, 0 to 9."""
    return "no"


# Random weights write numbers of any length, and fields of any name
PLACES = {
    "type": "object",
    "properties": {"place": {"enum": list(range(10))}},
    "required": ["place"],
    "additionalProperties": False,
}
LOOK = agents.Tool("look", look.description, PLACES, look.run)


def long_role(processor: Processor, tokens: int) -> str:
    """Returns a system prompt with which the common beginning of prompts has so many tokens at least."""

    def measure(text: str) -> int:
        messages = [{"role": "system", "content": text}]
        return processor(messages, [LOOK.declaration]).tokens.shape[1]

    text = ROLE
    while measure(text) < tokens:
        text += f" Rule {len(text)}: {RULE}"
    return text


async def run_swarm(model: ForcedCalls, role: str, tasks: Sequence[str], concurrency: int) -> dict[str, Any]:
    """Returns the seconds, the messages of each sub-agent, and its usage by step."""
    limits = agents.Limits(concurrency=concurrency, max_tokens=64)
    begin = time.perf_counter()
    run = await agents.swarm(Directed(model, role, tasks), [LOOK], mode="instant", limits=limits).run(
        "Find all.", seed=0
    )
    seconds = time.perf_counter() - begin
    if run.stop != "answer":
        raise RuntimeError(f"the swarm ended by {run.stop}: {run.error}")
    events = [event for event in run.trace.events if event["agent"] != "main"]
    said: dict[str, list[Any]] = {}
    for event in events:
        if event["event"] in ("message", "result"):
            said.setdefault(event["agent"], []).append(event.get("message", event.get("content")))
    steps = [event for event in events if event["event"] == "step"]
    return {"s": seconds, "said": said, "steps": steps, "usage": run.usage}


def shares(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the cached share of prompts: of first messages but the first sub-agent's, and of later ones."""
    found = {}
    for name, some in (
        ("first", [step for step in steps if step["n"] == 1 and step["agent"] != "finder#1"]),
        ("later", [step for step in steps if step["n"] > 1]),
    ):
        found[name] = sum(step["cached_tokens"] for step in some) / sum(step["prompt_tokens"] for step in some)
    return found


def compare(model: ForcedCalls, count: int, common: int) -> dict[str, Any]:
    """Runs a swarm without the prefix cache and with it. Raises RuntimeError where their messages differ."""
    role = long_role(model.processor, common)
    tasks = [f"Find item {number} of the report, and say where it was last seen." for number in range(count)]
    with no_prefix_cache():
        without = asyncio.run(run_swarm(model, role, tasks, count))
    found = asyncio.run(run_swarm(model, role, tasks, count))
    if found["said"] != without["said"]:
        raise RuntimeError("with the prefix cache the sub-agents say something else than without")
    if without["usage"].cached:
        raise RuntimeError(f"{without['usage'].cached} tokens were cached without a cache")
    usage, first = found["usage"], found["steps"][0]["prompt_tokens"]
    return {
        "sub_agents": count,
        "messages": len(found["steps"]),
        "first_prompt_tokens": first,
        **{f"cached_share_{name}": round(share, 4) for name, share in shares(found["steps"]).items()},
        "computed_of_sent": round(1 - usage.cached / usage.prompt, 4),
        "s": round(found["s"], 2),
        "s_without_cache": round(without["s"], 2),
        "new_tokens_per_s": round(usage.completion / found["s"], 1),
    }


@contextlib.contextmanager
def random_engine(family: str, slots: int, max_length: int = 4096) -> Iterator[tuple[Engine, Processor]]:
    """Yields an engine of a random model, and its processor."""
    import jax.numpy as jnp

    import checkpoints
    from checkpoints.toy import toy_config, write_toy

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_toy(Path(scratch) / family, toy_config(family))
        model = checkpoints.load(folder, dtype=jnp.float32)
        with Engine(model, slots=slots, max_length=max_length) as engine:
            yield engine, Processor.from_folder(folder)


def swarm_main(family: str, count: int) -> dict[str, Any]:
    with random_engine(family, count) as (engine, processor):
        model = ForcedCalls(engine, processor, calls=3)
        found = compare(model, count, 2_048)
        # One row at a time, with prompts that are new to the cache
        role = long_role(processor, 2_048).replace("Rule", "Law")
        alone = asyncio.run(run_swarm(model, role, [f"Find item {number}." for number in range(4)], 1))
    return {"family": family, **found, "new_tokens_per_s_one_row": round(alone["usage"].completion / alone["s"], 1)}


async def run_heavy(model: ForcedCalls, role: str, count: int) -> dict[str, Any]:
    """Returns the tokens of the prompt, how many of those of all runs were computed as a multiple of it, and the
    seconds."""
    trace = agents.Trace()
    agent = agents.Agent(model, [LOOK], role, "instant", limits=agents.Limits(max_tokens=64))
    begin = time.perf_counter()
    await agents.heavy(agent, "Find item 7 of the report.", count, trace=trace)
    seconds = time.perf_counter() - begin
    steps = [event for event in trace.events if event["event"] == "step" and event["n"] == 1]
    first = [step for step in steps if step["agent"] != "main"]
    (prompt,) = {step["prompt_tokens"] for step in first}
    computed = sum(prompt - step["cached_tokens"] for step in first)
    return {"prompt_tokens": prompt, "prefill": round(computed / prompt, 3), "s": round(seconds, 2)}


def heavy_main(family: str, count: int) -> dict[str, Any]:
    with random_engine(family, count) as (engine, processor):
        model, role = ForcedCalls(engine, processor, calls=1), long_role(processor, 2_048)
        with no_prefix_cache():
            without = asyncio.run(run_heavy(model, role, count))
        found = asyncio.run(run_heavy(model, role, count))
    return {"family": family, "runs": count, "with_cache": found, "without": without}


class Shown(agents.EngineModel):
    """Shows the picture that a task names, with its question: a tool that opened it would return it in a message of a
    kind that k25-digits is not trained on."""

    def __init__(self, engine: Engine, processor: Processor, shown: Mapping[str, list[dict[str, Any]]]):
        from kimi_jax import Sampling

        greedy = Sampling(temperature=0.0)
        super().__init__(engine, processor, {"thinking": greedy, "instant": greedy})
        self.shown = shown

    async def __call__(self, messages: Sequence[Any], tools: Sequence[Any], **settings: Any) -> agents.Reply:
        system, task, *rest = messages
        return await super().__call__(
            [system, {**task, "content": self.shown[task["content"]]}, *rest], tools, **settings
        )


def pictures(count: int) -> list[tuple[list[dict[str, Any]], str]]:
    """Returns pictures with their questions, a message's parts each, and the answers that they should get."""
    from kimi_jax.training.small import conversations, digits

    held = digits.load(True)

    def one(number: int) -> tuple[list[dict[str, Any]], str]:
        random = np.random.default_rng((77, number))
        if number % 2:
            return cases(count, one_picture=True)[number]
        text = conversations.number(random)
        drawn = data_url(digits.draw_number(text, held, digits.PLAIN, random))
        picture = {"type": "image_url", "image_url": {"url": drawn}}
        return [picture, {"type": "text", "text": conversations.READ[0]}], text

    return [one(number) for number in range(count)]


def pictures_main(count: int, out: str | None) -> dict[str, Any]:
    import checkpoints

    folder, asked = small.path("k25-digits"), pictures(count)
    shown = {f"picture {number}": parts for number, (parts, _) in enumerate(asked, 1)}
    tool = agents.Tool(**small.ADD_TOOL["function"], run=lambda a, b: a + b)
    with Engine(checkpoints.load(folder), slots=16, prefill_chunk=128, max_length=1280) as engine:
        # The role is a system prompt that the model is trained on
        model = Directed(
            Shown(engine, Processor.from_folder(folder), shown), "You read numbers and use tools.", list(shown)
        )
        swarm = agents.swarm(model, [tool], limits=agents.Limits(max_tokens=64))
        asyncio.run(swarm.run("Read all."))  # compiles the vision tower for pictures of these sizes
        run = asyncio.run(swarm.run("Read all.", trace=agents.Trace(out)))
    right = [said == answer for said, (_, answer) in zip(run.answer.split("\n"), asked, strict=True)]
    return {"right": sum(right), "of": count, "critical_steps": run.critical_steps, **vars(run.usage)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["heavy", "pictures", "swarm"])
    parser.add_argument("--family", choices=["k2.5", "kimi-linear"], default="k2.5")
    parser.add_argument("--agents", type=int, help="sub-agents or runs; 32, 8 and 12 if absent")
    parser.add_argument("--out", help="the trace of `pictures`, a new file, for `kimi-jax trace`")
    given = parser.parse_args()
    match given.what:
        case "heavy":
            found = heavy_main(given.family, given.agents or 8)
        case "pictures":
            found = pictures_main(given.agents or 12, given.out)
        case _:
            found = swarm_main(given.family, given.agents or 32)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
