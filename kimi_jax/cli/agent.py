"""Runs `kimi-jax agent`: a model works on a task with tools until there is an answer or a limit is reached."""

import argparse
import asyncio
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax.cli.arguments import SEED_MAX, add_sampling, given_sampling, local, sampling_of, whole
from kimi_jax.cli.partner import add_place, add_running, engine_of, server_address, server_key, server_of
from kimi_jax.cli.terminal import for_stdout
from kimi_jax.printable import printable

if TYPE_CHECKING:
    from kimi_jax.agents import ChatModel, Run, Tool, Trace

NAME = "agent"
SUMMARY = (
    "Let a model work on a task with tools until it answers. The answer goes to standard output, the steps to standard "
    "error. The exit code is 3 where a limit ended the work."
)
EXAMPLE = (
    'kimi-jax agent --model digits --prompt "Add the numbers." --image two-numbers.png --tool add\n'
    '  kimi-jax agent ~/models/kimi-k2.5-orbax --prompt "How much in May?" --tool sales.py --trace-out run.jsonl\n'
    '  kimi-jax agent http://localhost:8000 --model kimi-k2.5 --prompt "What is 17 + 25?" --tool add --steps 5'
)
LINE = 300  # characters of a line about a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the task")
    parser.add_argument(
        "--image", action="append", default=[], type=local, metavar="FILE", help="picture of the task; may be repeated"
    )
    parser.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="add|FILE.py",
        help="a calculator that adds, or the public functions of a Python file, which is run here; may be repeated",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--no-thinking", dest="thinking", action="store_false", help="use K2.5's Instant mode")
    parser.add_argument("--steps", type=whole(1), default=300, metavar="N", help="messages at most (default 300)")
    parser.add_argument(
        "--tool-calls", type=whole(0), default=1500, metavar="N", help="calls of tools at most (default 1500)"
    )
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=16_384, metavar="N", help="length of a message (default 16384)"
    )
    parser.add_argument("--trace-out", type=local, metavar="FILE", help="write events as JSON lines to a new file")
    add_sampling(parser)
    parser.add_argument("--seed", type=whole(0, SEED_MAX), metavar="N", help="seed (default 0)")
    add_running(parser)


def run(arguments: argparse.Namespace) -> None:
    url = server_of(arguments, ("seed",))
    if url is not None and arguments.model is None:
        raise ValueError("--model is not given; with a server's address it says which of its models works")
    if url is not None and (given := given_sampling(arguments)):
        raise ValueError(f"{', '.join(given)}: with a server's address tokens are drawn as Moonshot recommends")
    try:
        from kimi_jax import agents
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kimi-jax[agents]'") from None

    task = _task(arguments)
    tools = [one for name in arguments.tool for one in _tools(name)]
    agents.Toolset(tools)  # two of one name are refused before a model is loaded
    trace = _shown_trace(arguments.trace_out)
    if url is None:
        _finish(_work_here(arguments, tools, task, trace))
    else:
        model = agents.OpenAIModel.at(server_address(url), arguments.model, server_key(arguments))
        _finish(_work(arguments, model, tools, task, trace))


def _work_here(arguments: argparse.Namespace, tools: "list[Tool]", task: Any, trace: "Trace") -> "Run":
    """Loads the model, and works with it."""
    from kimi_jax.agents import EngineModel

    modes = (("thinking", True), ("instant", False))
    sampling: Any = {mode: sampling_of(arguments, arguments.path, thinking) for mode, thinking in modes}
    with engine_of(arguments) as (engine, processor):
        model = EngineModel(engine, processor, sampling, seed=arguments.seed or 0)
        return _work(arguments, model, tools, task, trace)


def _work(arguments: argparse.Namespace, model: "ChatModel", tools: "list[Tool]", task: Any, trace: "Trace") -> "Run":
    from kimi_jax.agents import Agent, Limits

    limits = Limits(steps=arguments.steps, tool_calls=arguments.tool_calls, max_tokens=arguments.max_new_tokens)
    agent = Agent(model, tools, arguments.system, "thinking" if arguments.thinking else "instant", limits)
    return asyncio.run(agent.run(task, trace=trace))


def _finish(run: "Run") -> None:
    """Prints the answer. Raises the model's exception, and SystemExit with 3 where a limit ended the run."""
    if run.error is not None:
        raise ValueError(f"the model failed at step {run.steps + 1}: {run.error}") from run.error
    print(for_stdout(run.answer))
    if run.stop != "answer":
        print(f"kimi-jax: stopped by its limit: {run.stop}, after {run.steps} steps", file=sys.stderr)
        raise SystemExit(3)


def _task(arguments: argparse.Namespace) -> Any:
    from kimi_jax.media.sources import as_data_url

    if not arguments.image:
        return arguments.prompt
    shown = [{"type": "image_url", "image_url": {"url": as_data_url(file)}} for file in arguments.image]
    return [*shown, {"type": "text", "text": arguments.prompt}]


def _tools(name: str) -> "list[Tool]":
    from kimi_jax import small
    from kimi_jax.agents import Tool, tool

    if name == "add":
        return [Tool(**small.ADD_TOOL["function"], run=lambda a, b: a + b)]
    path = Path(name)
    if path.suffix != ".py":
        raise ValueError(f"--tool {printable(name, LINE)}: expected add, or a Python file")
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        functions = [one for _, one in inspect.getmembers(module, inspect.isfunction) if one.__module__ == path.stem]
        made = [tool(one) for one in functions if not one.__name__.startswith("_")]
    except Exception as error:
        raise ValueError(f"{printable(path)}: {type(error).__name__}: {error}") from error
    if not made:
        raise ValueError(f"{printable(path)}: no public function is defined in it")
    return made


def _shown_trace(path: Path | None) -> "Trace":
    """Returns a trace that shows calls, results and reasoning on standard error as they come."""
    from kimi_jax.agents import Trace

    class Shown(Trace):
        def add(self, event: str, agent: str, parent: str | None, **fields: Any) -> None:
            """Adds one event, and shows it."""
            super().add(event, agent, parent, **fields)
            reasoning = fields.get("message", {}).get("reasoning_content")
            if event == "message" and reasoning:
                _note(f"  {reasoning}")
            elif event == "call":
                _note(f"→ {fields['name']} {fields['arguments']}")
            elif event == "result":
                _note(f"← {fields['content']}")

    return Shown(path)


def _note(text: str) -> None:
    print(printable(text, LINE), file=sys.stderr)
