"""Calls of tools in one conversation: whether each may run, its result, and the words for its failure."""

import asyncio
import collections
import json
import time
import traceback
from typing import Any

from kimi_jax.agents.limits import Budget, Limits
from kimi_jax.agents.model import Call, Content
from kimi_jax.agents.tools import ToolError, Toolset, error_text, run_tool
from kimi_jax.agents.trace import Trace

RESULT_LENGTH = 100_000
REPEATS = 3


class Calls:
    """Runs the calls of the agent `name`; `budget` and `trace` are those of the whole tree.

    refused: whether a call was refused because a budget was spent.
    """

    def __init__(self, tools: Toolset, limits: Limits, budget: Budget, trace: Trace, name: str, parent: str | None):
        self._tools, self._limits, self._budget, self._trace = tools, limits, budget, trace
        self._agent = (name, parent)
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._made = 0
        self.refused = False

    def forget(self) -> None:
        """Forgets which calls were made: their results were taken from the conversation."""
        self._seen.clear()

    async def run(self, call: Call) -> Content:
        """Runs one call, and returns its result, or the words for its failure."""
        self._trace.add("call", *self._agent, id=call.id, name=call.name, arguments=call.arguments)
        begin, failure = time.monotonic(), dict[str, Any]()
        content: Content
        try:
            one = self._tools.find(call.name)
            arguments = self._tools.read_arguments(call.name, call.arguments)
            key = (call.name, json.dumps(arguments, sort_keys=True))
            self._seen[key] += 1
            if self._seen[key] > REPEATS:
                failure["loop"] = True
                raise ToolError("this call was made three times before; its result does not change")
            if one.counts:
                self._take_from_budget()
            content = self._cut(await run_tool(one, arguments))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            content, failure["stack"] = error_text(error), traceback.format_exc()
        except ToolError as error:
            content, failure["error"] = error_text(error), str(error)
        except Exception as error:
            content, failure["stack"] = error_text(error), traceback.format_exc()
        seconds = time.monotonic() - begin
        self._trace.add("result", *self._agent, id=call.id, ok=not failure, s=seconds, content=content, **failure)
        return content

    def _take_from_budget(self) -> None:
        limits = self._limits
        if limits.calls is not None and self._made >= limits.calls:
            self.refused = True
            raise ToolError(f"the budget of {limits.calls} tool calls is spent; answer with what you have")
        if not self._budget.take_call():
            self.refused = True
            spent = self._budget.limits.tool_calls
            raise ToolError(f"the budget of {spent} tool calls is spent; answer with what you have")
        self._made += 1

    def _cut(self, content: Content) -> Content:
        """Returns a result in which each text is of a length that fits a prompt."""
        if not isinstance(content, str):
            return [{**one, "text": self._cut(one["text"])} if one["type"] == "text" else one for one in content]
        if len(content) <= RESULT_LENGTH:
            return content
        file, half = self._trace.keep_text(content), RESULT_LENGTH // 2
        left_out = f"{len(content) - RESULT_LENGTH} characters left out"
        where = "" if file is None else f", all of it in {file}"
        return f"{content[:half]}\n[... {left_out}{where}]\n{content[-half:]}"
