"""The loop of an agent: a model's message, its calls all at once, their results in order, until it makes no call."""

import asyncio
import collections
import json
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kimi_jax.agents.limits import Budget, Limits, Stop
from kimi_jax.agents.model import Call, ChatModel, Content, ContextLengthError, Message, Mode, Reply, Usage
from kimi_jax.agents.tools import Tool, ToolError, Toolset, error_text, run_tool
from kimi_jax.agents.trace import Trace
from kimi_jax.stages import Stage, critical_steps

RESULT_LENGTH = 100_000
REPEATS = 3
LAST_STEP = "This is your last step. No tools are available any more: give your final answer now."
GO_ON = "Your message ended before an answer, at its limit of tokens. Go on, briefly."


@dataclass(frozen=True)
class Run:
    """The result of a run: the answer (or the last words before a limit), why it stopped, and its counts.

    usage: tokens of this agent and its sub-agents. stages: each step with the steps of sub-agents launched in it, as
    `kimi_jax.training` takes them. error: the exception of the model where `stop` is "model_error".
    """

    answer: str
    stop: Stop
    steps: int
    stages: list[Stage]
    usage: Usage
    messages: list[Message]
    trace: Trace
    error: Exception | None = None

    @property
    def critical_steps(self) -> int:
        """The steps of the longest chain: each of this agent's, with those of the longest sub-agent it launched."""
        return critical_steps(self.stages)


@dataclass(frozen=True)
class Agent:
    """A model with tools and limits. `run` may be called many times, also at once: nothing is kept between runs.

    mode: "thinking" or "instant". run_tools: makes further tools for each run, which know its conversation.

    Raises ValueError for another mode, and what `Toolset` raises.
    """

    model: ChatModel
    tools: Sequence[Tool] = ()
    system: str | None = None
    mode: Mode = "thinking"
    limits: Limits = field(default_factory=Limits)
    run_tools: Callable[["Conversation"], Sequence[Tool]] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("instant", "thinking"):
            raise ValueError(f"mode is {self.mode!r}, expected 'instant' or 'thinking'")
        Toolset(self.tools)

    async def run(self, task: Content, *, trace: Trace | None = None) -> Run:
        """Works on a task until there is an answer or a limit is reached, which is no exception.

        task: a text, or parts in OpenAI's schema: texts, and pictures as `data:` URLs.

        Cancelling the task that runs this cancels and awaits everything below it.
        """
        conversation = Conversation(self, task, Budget(self.limits), trace or Trace())
        return await conversation.run()


@dataclass
class Conversation:
    """One agent at work on one task. `budget` and `trace` are those of the whole tree."""

    agent: Agent
    task: Content
    budget: Budget
    trace: Trace
    name: str = "main"
    parent: str | None = None
    messages: list[Message] = field(default_factory=list)
    stages: list[tuple[int, list[int]]] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        if self.agent.system is not None:
            self.messages.append({"role": "system", "content": self.agent.system})
        self.messages.append({"role": "user", "content": self.task})
        extra = self.agent.run_tools(self) if self.agent.run_tools is not None else ()
        self.tools = Toolset([*self.agent.tools, *extra])
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._ids: set[str] = set()
        self._made = 0
        self._usage = Usage()
        self._refused = False  # the budget of calls was spent when the last message made some
        self._answer = ""
        self._error: Exception | None = None

    async def run(self) -> Run:
        """Runs to the end and returns the result; the trace has its `stop` also where this is cancelled."""
        limits = self.agent.limits
        self._add(
            "run",
            model=str(self.agent.model),
            mode=self.agent.mode,
            limits=asdict(limits),
            tools=self.tools.declarations,
            task=self.task,
        )
        stop: Stop = "cancelled"
        try:
            async with asyncio.timeout(limits.time if self.parent is None else None) as clock:
                stop = await self._steps()
        except TimeoutError:
            if not clock.expired():
                raise
            stop = "time"
        finally:
            run = Run(
                self._answer,
                stop,
                len(self.stages),
                list(self.stages),
                self.budget.usage if self.parent is None else self._usage,
                self.messages,
                self.trace,
                self._error,
            )
            usage = vars(run.usage)
            self._add(
                "stop", why=stop, answer=run.answer, steps=run.steps, critical_steps=run.critical_steps, usage=usage
            )
        return run

    async def _steps(self) -> Stop:
        limits, asked = self.agent.limits, False
        while True:
            if limits.critical_steps is not None and critical_steps(self.stages) >= limits.critical_steps:
                return "critical_steps"
            if self.budget.tokens_spent:
                return "tokens"
            last = len(self.stages) + 1 >= limits.steps
            if last:
                self.messages.append({"role": "user", "content": LAST_STEP})
            try:
                reply = await self._ask([] if last else self.tools.declarations)
            except ContextLengthError:
                return "tokens"
            except Exception as error:
                self._error = error
                return "model_error"
            self._answer = reply.content or self._answer
            if not reply.calls:
                if reply.content or reply.finish != "length":
                    return "answer"
                if asked or last:
                    return "length"
                asked = True
                self.messages.append({"role": "user", "content": GO_ON})
                continue
            if last:
                return "steps"
            if self._refused:
                return "tool_calls"
            await self._run_calls(reply.calls)

    async def _ask(self, tools: Sequence[dict[str, Any]]) -> Reply:
        """Takes one step, and adds its message to the history."""
        begin = time.monotonic()
        mode = self.agent.mode
        reply = await self.agent.model(self.messages, tools, mode=mode, max_tokens=self.agent.limits.max_tokens)
        reply = replace(reply, calls=tuple(self._with_id(call, self.calls + n) for n, call in enumerate(reply.calls)))
        self.calls += len(reply.calls)
        self.budget.usage += reply.usage
        self._usage += reply.usage
        self.stages.append((1, []))
        message: Message = {"role": "assistant", "content": reply.content}
        if reply.reasoning is not None and mode != "instant":
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reply.calls
            ]
        self.messages.append(message)
        usage = {f"{kind}_tokens": count for kind, count in vars(reply.usage).items()}
        self._add("step", n=len(self.stages), s=time.monotonic() - begin, finish=reply.finish, **usage)
        self._add("message", message=message)
        return reply

    def _with_id(self, call: Call, number: int) -> Call:
        """Returns a call whose id has the form that the model was trained on, unique in the conversation."""
        known = re.fullmatch(rf"functions\.{re.escape(call.name)}:\d+", call.id) and call.id not in self._ids
        call = call if known else replace(call, id=f"functions.{call.name}:{number}")
        self._ids.add(call.id)
        return call

    async def _run_calls(self, calls: Sequence[Call]) -> None:
        """Runs the calls of one message at once, and adds their results in the order of the calls."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._call(call)) for call in calls]
        for call, task in zip(calls, tasks, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": task.result()})

    async def _call(self, call: Call) -> str:
        """Runs one call, and returns its result, or the words for its failure."""
        self._add("call", id=call.id, name=call.name, arguments=call.arguments)
        begin, failure = time.monotonic(), dict[str, Any]()
        try:
            one = self.tools.find(call.name)
            arguments = self.tools.read_arguments(call.name, call.arguments)
            key = (call.name, json.dumps(arguments, sort_keys=True))
            self._seen[key] += 1
            if self._seen[key] > REPEATS:
                failure["loop"] = True
                raise ToolError("this call was made three times before; its result does not change")
            if one.counts:
                self._take_from_budget()
            text = self._cut(await run_tool(one, arguments))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            text, failure["stack"] = error_text(error), traceback.format_exc()
        except ToolError as error:
            text, failure["error"] = error_text(error), str(error)
        except Exception as error:
            text, failure["stack"] = error_text(error), traceback.format_exc()
        self._add("result", id=call.id, ok=not failure, s=time.monotonic() - begin, content=text, **failure)
        return text

    def _take_from_budget(self) -> None:
        limits = self.agent.limits
        if limits.calls is not None and self._made >= limits.calls:
            self._refused = True
            raise ToolError(f"the budget of {limits.calls} tool calls is spent; answer with what you have")
        if not self.budget.take_call():
            self._refused = True
            spent = self.budget.limits.tool_calls
            raise ToolError(f"the budget of {spent} tool calls is spent; answer with what you have")
        self._made += 1

    def _cut(self, text: str) -> str:
        if len(text) <= RESULT_LENGTH:
            return text
        file, half = self.trace.keep_text(text), RESULT_LENGTH // 2
        left_out = f"{len(text) - RESULT_LENGTH} characters left out"
        where = "" if file is None else f", all of it in {file}"
        return f"{text[:half]}\n[... {left_out}{where}]\n{text[-half:]}"

    def _add(self, event: str, **fields: Any) -> None:
        self.trace.add(event, self.name, self.parent, **fields)
