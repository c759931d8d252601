"""Runs the calls of tools in a conversation, and puts failures into words for the model."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax.agents import Tool

STOPPED = "Error: stopped by the person"


class Calls:
    """Runs calls of `tools`. Raises ValueError where two have one name."""

    def __init__(self, tools: "Sequence[Tool]"):
        from kimi_jax.agents import Toolset

        self._tools = Toolset(tools)
        self.declarations = self._tools.declarations

    async def results(self, calls: Sequence[Mapping[str, Any]]) -> list[str]:
        """Runs the calls of one message at once, and returns their results in the order of the calls."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._result(**call["function"])) for call in calls]
        return [task.result() for task in tasks]

    async def _result(self, name: str, arguments: str) -> str:
        from kimi_jax.agents.loop import RESULT_LENGTH
        from kimi_jax.agents.tools import error_text, run_tool

        try:
            text = await run_tool(self._tools.find(name), self._tools.read_arguments(name, arguments))
        except Exception as error:
            return error_text(error)
        if len(text) <= RESULT_LENGTH:
            return text
        half = RESULT_LENGTH // 2
        return f"{text[:half]}\n[... {len(text) - RESULT_LENGTH} characters left out]\n{text[-half:]}"
