"""Agents: right answers of the small trained Kimi with a calculator, and a swarm's time beside a single agent's.

    python benchmarks/agent_runs.py digits --cases 100   # an engine in this process; compiling takes most of a minute
    python benchmarks/agent_runs.py swarm --items 30     # scripted model and tools, no engine
    python benchmarks/agent_runs.py chain --steps 300    # the loop's own time and memory

`digits`: pictures of two numbers in handwritten digits that are held out from training, either both in one picture or
one in each of two, and the question for their sum. A case is right where the answer is the sum in the words of training
and the trace is complete: the run, its call of the tool with its result, each message, the stop.

`swarm`: m items of two look-ups each; a message of the model takes 50 ms and a tool 100 ms. A single agent makes a call
in each message; the orchestrator of the swarm gives each item to a sub-agent.

`chain`: a model that answers at once and makes a call in each message; the trace goes to a file. Memory is what Python
allocated beyond the messages' own growth: `bytes_a_step` of the second half is that of the first where nothing leaks.
"""

import argparse
import asyncio
import base64
import io
import json
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kimi_jax import agents, small

TURN, TOOL = 0.05, 0.1  # seconds


def data_url(picture: np.ndarray) -> str:
    """Returns a picture uint8 [height, width, 3] as a PNG in a `data:` URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def cases(count: int, one_picture: bool) -> list[tuple[list[dict[str, Any]], str]]:
    """Returns tasks, a message's parts each, with the answers they should get."""
    from kimi_jax.training.small import conversations, digits

    held, made = digits.load(True), []
    for number in range(count):
        random = np.random.default_rng((4242, number))

        def draw(text: str, random: np.random.Generator = random) -> np.ndarray:
            return digits.draw_number(text, held, digits.PLAIN, random)

        messages = conversations.add_pictures(random, draw, float(one_picture))["messages"]
        asked = next(one for one in messages if one["role"] == "user")["content"]
        parts = [
            part if part["type"] == "text" else {**part, "image_url": {"url": data_url(part["image_url"]["url"])}}
            for part in asked
        ]
        made.append((parts, messages[-1]["content"]))
    return made


def is_complete(run: agents.Run) -> bool:
    """Says whether a trace has all events of one call and the answer, in order."""
    kinds = [event["event"] for event in run.trace.events]
    return kinds == ["run", "step", "message", "call", "result", "step", "message", "stop"]


async def sums(model: agents.ChatModel, tasks: list[tuple[list[dict[str, Any]], str]]) -> tuple[int, int, agents.Usage]:
    """Returns how many answers are right, how many traces complete, and the tokens."""
    tool = agents.Tool(**small.ADD_TOOL["function"], run=lambda a, b: a + b)
    agent = agents.Agent(model, [tool], limits=agents.Limits(steps=4, max_tokens=64))
    runs = await asyncio.gather(*(agent.run(task) for task, _ in tasks))
    right = [run.stop == "answer" and run.answer == answer for run, (_, answer) in zip(runs, tasks, strict=True)]
    usage = sum((run.usage for run in runs), agents.Usage())
    return sum(right), sum(map(is_complete, runs)), usage


def digits_main(count: int) -> dict[str, Any]:
    import checkpoints
    from kimi_jax import Engine, Processor, Sampling

    folder = small.path("k25-digits")
    greedy = Sampling(temperature=0.0)
    with Engine(checkpoints.load(folder), slots=16, prefill_chunk=128, max_length=1280) as engine:
        model = agents.EngineModel(engine, Processor.from_folder(folder), {"thinking": greedy, "instant": greedy})
        found = {}
        for name, one_picture in (("one picture", True), ("two pictures", False)):
            begin = time.perf_counter()
            right, complete, usage = asyncio.run(sums(model, cases(count, one_picture)))
            seconds = round(time.perf_counter() - begin, 2)
            found[name] = {"right": right, "complete": complete, "of": count, "s": seconds, **vars(usage)}
    return found


def call(name: str, /, **arguments: str) -> agents.Call:
    return agents.Call("", name, json.dumps(arguments))


def looker(messages: Any, first: int, count: int) -> agents.Reply:
    """Returns the next of `count` look-ups from number `first` on, or the answer."""
    made = sum(one["role"] == "tool" for one in messages)
    return agents.Reply(None, calls=(call("look", key=str(first + made)),)) if made < count else agents.Reply("found")


async def swarm_main(items: int, concurrency: int) -> dict[str, Any]:
    async def look(key: str) -> str:
        await asyncio.sleep(TOOL)
        return key

    def answer(messages: Any, tools: Any) -> agents.Reply:
        if messages[0]["content"] == "Look up.":
            return looker(messages, 2 * int(messages[1]["content"]), 2)
        made = sum(one["role"] == "assistant" for one in messages)
        tasks = tuple(call("assign_task", agent="finder", prompt=str(item)) for item in range(items))
        create = call("create_subagent", name="finder", system_prompt="Look up.")
        return [agents.Reply(None, calls=(create,)), agents.Reply(None, calls=tasks), agents.Reply("all")][made]

    tools = [agents.tool(look)]
    single = agents.Agent(agents.ScriptedModel(lambda messages, _: looker(messages, 0, 2 * items), TURN), tools)
    limits = agents.Limits(concurrency=concurrency)
    many = agents.swarm(agents.ScriptedModel(answer, TURN), tools, limits=limits)
    found: dict[str, Any] = {}
    # Messages and tools of the longest chain
    waves = -(-items // concurrency)
    for name, agent, least in (
        ("single", single, (2 * items + 1) * TURN + 2 * items * TOOL),
        ("swarm", many, 3 * TURN + waves * (3 * TURN + 2 * TOOL)),
    ):
        begin = time.perf_counter()
        run = await agent.run("Find all.")
        seconds = time.perf_counter() - begin
        assert run.stop == "answer", run
        found[name] = {"s": seconds, "overhead_s": seconds - least, "critical_steps": run.critical_steps}
    return found


def chain_main(steps: int) -> dict[str, Any]:
    def look(key: str) -> str:
        marks.append((time.process_time(), tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0))
        return key

    def chain(path: Path) -> None:
        marks.clear()
        model = agents.ScriptedModel(lambda messages, _: looker(messages, 0, steps - 1))
        agent = agents.Agent(model, [agents.tool(look)], limits=agents.Limits(steps=steps))
        run = asyncio.run(agent.run("Find all.", trace=agents.Trace(path)))
        assert (run.stop, run.steps) == ("answer", steps), run

    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        chain(Path(folder) / "a.jsonl")
        seconds, half = time.process_time() - begin, len(marks) // 2
        halves = [marks[half - 1][0] - marks[0][0], marks[-1][0] - marks[half][0]]
        tracemalloc.start()  # apart, because it takes time
        chain(Path(folder) / "b.jsonl")
    grown = [marks[half - 1][1] - marks[0][1], marks[-1][1] - marks[half][1]]
    return {
        "steps": steps,
        "cpu_s": seconds,
        "cpu_s_of_halves": halves,
        "bytes_a_step_of_halves": [bytes_ / half for bytes_ in grown],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chain", "digits", "swarm"])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--items", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of the swarm; the fastest of each counts")
    given = parser.parse_args()
    if given.what == "digits":
        print(json.dumps(digits_main(given.cases), indent=1))
        return
    if given.what == "chain":
        print(json.dumps(chain_main(given.steps), indent=1))
        return
    rounds = [asyncio.run(swarm_main(given.items, given.concurrency)) for _ in range(given.rounds)]
    best = {name: min((one[name] for one in rounds), key=lambda found: found["s"]) for name in ("single", "swarm")}
    speed_up = best["single"]["s"] / best["swarm"]["s"]
    print(json.dumps({"items": given.items, "concurrency": given.concurrency, **best, "speed_up": speed_up}, indent=1))


if __name__ == "__main__":
    main()
