"""Runs the calls of tools in a conversation with a person, who sees their results."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax.agents import Tool, Toolset

STOPPED = "Error: stopped by the person"


class Calls:
    """Runs calls of the tools that `source` gives, which is entered by `open` and left by `close`."""

    def __init__(self, source: "contextlib.AbstractAsyncContextManager[Sequence[Tool]]"):
        self._source = source
        self._ended = asyncio.Event()
        self._opened: Any = None

    async def open(self) -> list[dict[str, Any]]:
        """Returns the declarations of the tools. Raises what `source` raises, and ValueError where two have one name.

        A task of its own keeps them open: connections have to be closed by the task that opened them.
        """
        ready: asyncio.Future[Toolset] = asyncio.get_running_loop().create_future()
        self._opened = asyncio.create_task(self._keep_open(ready))
        self._tools = await ready
        return self._tools.declarations

    async def _keep_open(self, ready: "asyncio.Future[Toolset]") -> None:
        from kimi_jax.agents import Toolset

        try:
            async with contextlib.AsyncExitStack() as stack:
                tools = Toolset(await stack.enter_async_context(self._source))
                ready.set_result(await tools.open(stack))
                await self._ended.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def close(self) -> None:
        """Closes what `open` opened."""
        self._ended.set()
        if self._opened is not None:
            await self._opened

    def of_a_turn(self) -> "Turn":
        """Returns what runs the calls until the model answers without any."""
        return Turn(self._tools)


class Turn:
    """Runs the calls of the messages between a person's line and the answer to it, as those of an agent run."""

    def __init__(self, tools: "Toolset"):
        from kimi_jax.agents import Limits, Trace
        from kimi_jax.agents.calls import Calls as AgentCalls
        from kimi_jax.agents.limits import Budget

        self._calls = AgentCalls(tools, Limits(), Budget(Limits()), Trace(), "main", None)

    async def results(self, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Runs the calls of one message at once, and returns their results in the order of the calls: texts, or parts
        with pictures."""
        from kimi_jax.agents import Call

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._calls.run(Call(one["id"], **one["function"]))) for one in calls]
        return [task.result() for task in tasks]
