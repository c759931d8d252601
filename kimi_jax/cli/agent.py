"""Runs `kimi-jax agent`: a model works on a task with tools until there is an answer or a limit is reached."""

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax.cli.arguments import SEED_MAX, add_sampling, given_sampling, local, place, sampling_of, seconds, whole
from kimi_jax.cli.partner import add_place, add_running, engine_of, server_address, server_key, server_of
from kimi_jax.cli.terminal import for_stdout
from kimi_jax.cli.tools import add_tools, connected, tools_of

if TYPE_CHECKING:
    from kimi_jax.agents import Agent, ChatModel, Limits, Run, Tool, Trace

NAME = "agent"
SUMMARY = (
    "Let a model work on a task with tools until it answers. The answer goes to standard output, the steps to standard "
    "error where that is a terminal. Tools that write, run code or reach a network ask before each call. The exit code "
    "is 3 where a limit ended the work."
)
EXAMPLE = (
    'kimi-jax agent "Add the numbers." --image two-numbers.png --tool add\n'
    '  kimi-jax agent ~/models/kimi-k2.5-orbax "How much in May?" --tool files:reports --tool sales.py --time 10m\n'
    '  kimi-jax agent http://localhost:8000 "Compare the twelve plans." --model kimi-k2.5 --tool files:plans --swarm'
)
OF_SWARM = ("sub_steps", "subagents", "concurrency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser, str)
    parser.add_argument("task", nargs="?", metavar="TASK", help="the task, after the folder or URL, or by itself")
    parser.add_argument("--prompt", metavar="TEXT", help="the task, in place of TASK")
    parser.add_argument(
        "--image", action="append", default=[], type=local, metavar="FILE", help="picture of the task; may be repeated"
    )
    add_tools(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--no-thinking", dest="thinking", action="store_false", help="use K2.5's Instant mode")
    parser.add_argument("--swarm", action="store_true", help="let the model hand tasks to sub-agents, side by side")
    parser.add_argument(
        "--heavy", type=whole(1, 64), metavar="N", help="let N runs work side by side, and one more merge their answers"
    )
    parser.add_argument(
        "--steps", type=whole(1), metavar="N", help="messages at most (default 300; of a swarm's main agent 15)"
    )
    parser.add_argument("--sub-steps", type=whole(1), metavar="N", help="messages of a sub-agent (default 100)")
    parser.add_argument("--subagents", type=whole(1), metavar="N", help="sub-agents in all (default 100)")
    parser.add_argument("--concurrency", type=whole(1), metavar="N", help="sub-agents at one time (default 32)")
    parser.add_argument(
        "--tool-calls", type=whole(0), default=1500, metavar="N", help="calls of tools in all (default 1500)"
    )
    parser.add_argument("--time", type=seconds, metavar="TIME", help="time in all, like 90s, 10m or 2h")
    parser.add_argument(
        "--context",
        choices=["keep", "hide-tool-results", "discard-all"],
        default="keep",
        help="what is done as the context fills up: nothing, so that the work ends; earlier results go; or all but the "
        "task (default keep)",
    )
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=16_384, metavar="N", help="length of a message (default 16384)"
    )
    parser.add_argument("--trace-out", type=local, metavar="FILE", help="write events as JSON lines to a new file")
    parser.add_argument("--json", action="store_true", help="print events as JSON lines in place of the answer")
    add_sampling(parser)
    parser.add_argument("--seed", type=whole(0, SEED_MAX), metavar="N", help="seed (default 0)")
    add_running(parser)


def run(arguments: argparse.Namespace) -> None:
    task = _task(arguments)
    url = server_of(arguments, ("seed",))
    if url is not None and arguments.model is None:
        raise ValueError("--model is not given; with a server's address it says which of its models works")
    if url is not None and (given := given_sampling(arguments)):
        raise ValueError(f"{', '.join(given)}: with a server's address tokens are drawn as Moonshot recommends")
    swarms = [f"--{name.replace('_', '-')}" for name in OF_SWARM if getattr(arguments, name) is not None]
    if swarms and not arguments.swarm:
        raise ValueError(f"{', '.join(swarms)}: for a swarm, with --swarm")
    if arguments.heavy is not None and arguments.seed is not None:
        raise ValueError("--seed: the runs of --heavy N have the seeds 0 to N - 1")
    tools = tools_of(arguments)
    from kimi_jax.agents import OpenAIModel, Trace
    from kimi_jax.cli.console import console
    from kimi_jax.cli.dialogue.asking import Asker
    from kimi_jax.cli.dialogue.steps import Steps

    log, asking = console(stderr=True), set[str]()
    steps = Steps(log, table=arguments.swarm or arguments.heavy is not None, asking=asking)
    asker = Asker(log, asking, steps.pause)

    def listen(entry: dict[str, Any]) -> None:
        if arguments.json:
            print(json.dumps(entry), flush=True)
        steps(entry)

    trace = Trace(arguments.trace_out, listen=listen)

    async def work(model: "ChatModel") -> "Run":
        async with steps, connected(arguments, tools, asking, asker) as every:
            agent = _agent(arguments, model, every)
            if arguments.heavy is None:
                return await agent.run(task, trace=trace, seed=arguments.seed)
            return await _heavy(agent, task, arguments.heavy, trace)

    if url is None:
        done = _work_here(arguments, work)
    else:
        done = asyncio.run(work(OpenAIModel.at(server_address(url), arguments.model, server_key(arguments))))
    _finish(done, arguments.json)


def _work_here(arguments: argparse.Namespace, work: "Callable[[ChatModel], Coroutine[Any, Any, Run]]") -> "Run":
    """Loads the model, and works with it."""
    from kimi_jax.agents import EngineModel

    modes = (("thinking", True), ("instant", False))
    sampling: Any = {mode: sampling_of(arguments, arguments.path, thinking) for mode, thinking in modes}
    slots = max(_limits(arguments).concurrency if arguments.swarm else 1, arguments.heavy or 1)
    with engine_of(arguments, slots) as (engine, processor):
        return asyncio.run(work(EngineModel(engine, processor, sampling, seed=arguments.seed or 0)))


def _agent(arguments: argparse.Namespace, model: "ChatModel", tools: "list[Tool]") -> "Agent":
    from kimi_jax import agents

    mode: agents.Mode = "thinking" if arguments.thinking else "instant"
    if arguments.swarm:
        system = {} if arguments.system is None else {"system": arguments.system}
        main = agents.swarm(model, tools, mode=mode, limits=_limits(arguments), **system)
    else:
        main = agents.Agent(model, tools, arguments.system, mode, _limits(arguments))
    return replace(main, context=arguments.context)


async def _heavy(agent: "Agent", task: Any, count: int, trace: "Trace") -> "Run":
    """Returns the run that merges the answers of `count` runs. Raises ValueError where there is none."""
    from kimi_jax import agents

    try:
        return (await agents.heavy(agent, task, count, trace=trace)).merged
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _limits(arguments: argparse.Namespace) -> "Limits":
    """Returns the limits that are given, and the defaults for others."""
    from kimi_jax.agents import Limits
    from kimi_jax.agents.swarm import LIMITS

    names = ("steps", *OF_SWARM, "tool_calls", "time")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(LIMITS if arguments.swarm else Limits(), max_tokens=arguments.max_new_tokens, **given)


def _finish(run: "Run", printed: bool) -> None:
    """Prints the answer, unless its event is `printed`. Raises the model's exception, and SystemExit with 3 where a
    limit ended the run."""
    if run.error is not None:
        raise ValueError(f"the model failed at step {run.steps + 1}: {run.error}") from run.error
    if not printed:
        print(for_stdout(run.answer))
    if run.stop != "answer":
        print(f"kimi-jax: stopped by its limit: {run.stop}, after {run.steps} steps", file=sys.stderr)
        raise SystemExit(3)


def _task(arguments: argparse.Namespace) -> Any:
    """Returns the task as a message's content, and makes `arguments.path` the folder or URL: a single word of the
    command line is the task where no `--prompt` is given."""
    from kimi_jax.media.sources import as_data_url

    text = arguments.prompt if arguments.task is None else arguments.task
    if arguments.prompt is not None and arguments.task is not None:
        raise ValueError("the task is given twice: as TASK and with --prompt")
    if text is None and arguments.path is not None and not _is_place(arguments.path):
        text, arguments.path = arguments.path, None
    if text is None:
        raise ValueError('the task is missing: kimi-jax agent [FOLDER|URL] "TASK"')
    if arguments.path is not None:
        try:
            arguments.path = place(arguments.path)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
    if not arguments.image:
        return text
    shown = [{"type": "image_url", "image_url": {"url": as_data_url(file)}} for file in arguments.image]
    return [*shown, {"type": "text", "text": text}]


def _is_place(word: str) -> bool:
    """Says whether a word is a URL or a folder that is there, and so no task."""
    with contextlib.suppress(OSError, ValueError):
        return word.startswith(("http://", "https://", "file://")) or Path(word).is_dir()
    return False
