"""Gathers the tools that `agent` and `chat` are given by name, and has those that need it ask a person first."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.util
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax import json_reader
from kimi_jax.cli.arguments import local
from kimi_jax.printable import printable

if TYPE_CHECKING:
    from kimi_jax.agents import Tool

# Is given a tool and its arguments; returns, or raises ToolError with the words of the refusal.
Permit = Callable[["Tool", dict[str, Any]], Awaitable[None]]


def add_tools(parser: argparse.ArgumentParser) -> None:
    """Adds `--tool`, `--mcp` and `--yes`."""
    parser.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="add|python|files:DIR|FILE.py",
        help="a calculator that adds; a Python interpreter in a box; listing, reading and searching in a folder; or "
        "the public functions of a Python file, which is run here; may be repeated",
    )
    parser.add_argument(
        "--mcp",
        action="append",
        default=[],
        type=local,
        metavar="FILE",
        help='tools of MCP servers: JSON with {"mcpServers": {NAME: {"command": ...} or {"url": ...}}}; '
        "may be repeated",
    )
    parser.add_argument(
        "--unsafe-python", action="store_true", help="with --tool python: run code where this machine has no box for it"
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="let all tools run (default: ask before each call of tools that run code or reach a network)",
    )


def tools_of(arguments: argparse.Namespace) -> "list[Tool]":
    """Returns the tools that `--tool` names. Raises ValueError or OSError for a name that is none, for a `--mcp` file
    that cannot be read, and where two tools have one name."""
    try:
        from kimi_jax.agents import Toolset
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kimi-jax[agents]'") from None
    for file in arguments.mcp:
        json_reader.read_object(file)
    tools = [one for name in arguments.tool for one in _named(name, arguments.unsafe_python)]
    Toolset(tools)
    return tools


@contextlib.asynccontextmanager
async def connected(
    arguments: argparse.Namespace, tools: "Sequence[Tool]", asking: set[str], permit: Permit
) -> "AsyncIterator[list[Tool]]":
    """Connects to the servers of `--mcp` while the block runs. Yields `tools` and theirs, as `with_permission` makes
    them; without `--yes`, adds the names of those that ask to `asking`.

    Raises ValueError for a server that does not answer, and where `mcp` is not installed.
    """
    async with contextlib.AsyncExitStack() as stack:
        found = list(tools)
        for file in arguments.mcp:
            from kimi_jax.agents import mcp_tools

            try:
                found += await stack.enter_async_context(mcp_tools(file))
            except ModuleNotFoundError as error:
                raise ValueError(f"{error.name} is not installed: pip install 'kimi-jax[agents]'") from None
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        if not arguments.yes:
            asking |= {one.name for one in found if one.asks}
        yield with_permission(found, permit)


def _named(name: str, unsafe_python: bool) -> "list[Tool]":
    from kimi_jax import small
    from kimi_jax.agents import Tool, files, python

    if name == "add":
        return [Tool(**small.ADD_TOOL["function"], run=lambda a, b: a + b)]
    if name == "python":
        try:
            return [python(unsafe=unsafe_python)]
        except RuntimeError as error:
            raise ValueError(f"--tool python: {error}; --unsafe-python runs code without one") from None
    kind, found, folder = name.partition(":")
    if found and kind == "files":
        return files(folder)
    if not name.endswith(".py"):
        raise ValueError(f"--tool {printable(name, 300)}: expected add, python, files:DIR or a Python file")
    return _functions(Path(name))


def _functions(path: Path) -> "list[Tool]":
    """Runs a Python file, and returns its public functions as tools that ask."""
    from kimi_jax.agents import tool

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
    return [
        replace(one, asks=True, run=one.run if inspect.iscoroutinefunction(one.run) else _in_thread(one.run))
        for one in made
    ]


def _in_thread(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Returns a coroutine function that runs `function` in a thread which does not keep the process from ending."""

    @functools.wraps(function)
    async def run(**arguments: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                future.set_result(function(**arguments))
            except StopIteration as error:  # which no future takes
                future.set_exception(RuntimeError(f"StopIteration: {error}"))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name=function.__name__, daemon=True).start()
        return await asyncio.wrap_future(future)

    return run


def with_permission(tools: "Sequence[Tool]", permit: Permit) -> "list[Tool]":
    """Returns the tools; those that ask call `permit` before they run. Waiting for it takes nothing of their time."""
    return [_guarded(one, permit) if one.asks else one for one in tools]


def _guarded(one: "Tool", permit: Permit) -> "Tool":
    from kimi_jax.agents import Parts
    from kimi_jax.agents.tools import run_tool

    async def run(**arguments: Any) -> Any:
        await permit(one, arguments)
        result = await run_tool(one, arguments)
        return result if isinstance(result, str) else Parts(result)

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        async with one.run() as inner:
            yield _guarded(replace(one, run=inner, opens=False), permit).run

    return replace(one, run=opened if one.opens else run, timeout=None)
