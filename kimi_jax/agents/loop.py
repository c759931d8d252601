"""The loop of an agent: a model's message, its calls all at once, their results in order, until it makes no call."""

import asyncio
import random
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kimi_jax.agents.calls import Calls
from kimi_jax.agents.context import STRATEGIES, Strategy, prompt_limit
from kimi_jax.agents.limits import Budget, Limits, Stop
from kimi_jax.agents.model import BusyError, Call, ChatModel, Content, ContextLengthError, Message, Mode, Reply, Usage
from kimi_jax.agents.tools import Tool, Toolset
from kimi_jax.agents.trace import Trace
from kimi_jax.stages import Stage, critical_steps

RETRIES = 3
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one, as openai's client does
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
    context: what is done where a prompt is longer than `threshold`, a share of the context, less `max_tokens`: "keep"
        nothing (a prompt that does not fit ends the run), "hide-tool-results", or "discard-all" but the task.

    Raises ValueError for another mode, context or threshold, and what `Toolset` raises.
    """

    model: ChatModel
    tools: Sequence[Tool] = ()
    system: str | None = None
    mode: Mode = "thinking"
    limits: Limits = field(default_factory=Limits)
    run_tools: Callable[["Conversation"], Sequence[Tool]] | None = None
    context: Strategy = "keep"
    threshold: float = 0.85

    def __post_init__(self) -> None:
        if self.mode not in ("instant", "thinking"):
            raise ValueError(f"mode is {self.mode!r}, expected 'instant' or 'thinking'")
        if self.context not in STRATEGIES:
            raise ValueError(f"context is {self.context!r}, expected {', '.join(STRATEGIES)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}, expected a share of the context above 0, 1 at most")
        Toolset(self.tools)

    async def run(self, task: Content, *, trace: Trace | None = None, seed: int | None = None) -> Run:
        """Works on a task until there is an answer or a limit is reached, which is no exception.

        task: a text, or parts in OpenAI's schema: texts, and pictures as `data:` URLs.
        seed: makes the model's answers repeatable; None leaves them to the model.

        Cancelling the task that runs this cancels and awaits everything below it.
        """
        conversation = Conversation(self, task, Budget(self.limits), trace or Trace(), seed=seed)
        return await conversation.run()

    async def stream(
        self, task: Content, *, path: str | Path | None = None, seed: int | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Works on a task as `run` does, and yields each event of the trace when it happens; the last is the `stop`.

        path: a new file for the trace. Closing the iterator early (`contextlib.aclosing`) cancels the run.
        """
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        run = asyncio.create_task(self.run(task, trace=Trace(path, listen=events.put_nowait), seed=seed))
        run.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await run
        finally:
            run.cancel()
            await asyncio.wait([run])


@dataclass
class Conversation:
    """One agent at work on one task. `budget` and `trace` are those of the whole tree.

    is_root: whether the tree has no agent above this one. seed: of the model's answers; None leaves them to the model.
    """

    agent: Agent
    task: Content
    budget: Budget
    trace: Trace
    name: str = "main"
    parent: str | None = None
    is_root: bool = True
    seed: int | None = None
    messages: list[Message] = field(default_factory=list)
    stages: list[tuple[int, list[int]]] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        if self.agent.system is not None:
            self.messages.append({"role": "system", "content": self.agent.system})
        self.messages.append({"role": "user", "content": self.task})
        extra = self.agent.run_tools(self) if self.agent.run_tools is not None else ()
        self.tools = Toolset([*self.agent.tools, *extra])
        self._ids: set[str] = set()
        self._usage = Usage()
        self._last = Usage()  # of the last answer, which the messages go on from
        self._answer = ""
        self._error: Exception | None = None

    @property
    def prefix(self) -> str:
        """The beginning of the names of this agent's sub-agents."""
        return "" if self.name == "main" else f"{self.name}/"

    async def run(self) -> Run:
        """Runs to the end and returns the result; the trace has its `stop` also where this is cancelled."""
        limits = self.agent.limits
        self._add(
            "run",
            model=str(self.agent.model),
            mode=self.agent.mode,
            limits=asdict(limits),
            tools=self.tools.declarations,
            system=self.agent.system,
            task=self.task,
        )
        stop: Stop = "cancelled"
        try:
            async with asyncio.timeout(limits.time if self.is_root else None) as clock, AsyncExitStack() as stack:
                tools = await self.tools.open(stack)
                calls = Calls(tools, limits, self.budget, self.trace, self.name, self.parent)
                stop = await self._steps(calls)
        except TimeoutError:
            if not clock.expired():
                raise
            stop = "time"
        finally:
            if self.is_root:
                self.budget.concurrency.close()
            run = Run(
                self._answer,
                stop,
                len(self.stages),
                list(self.stages),
                self.budget.usage if self.is_root else self._usage,
                self.messages,
                self.trace,
                self._error,
            )
            usage = vars(run.usage)
            self._add(
                "stop", why=stop, answer=run.answer, steps=run.steps, critical_steps=run.critical_steps, usage=usage
            )
        return run

    async def _steps(self, calls: Calls) -> Stop:
        limits, asked = self.agent.limits, False
        while True:
            if limits.critical_steps is not None and critical_steps(self.stages) >= limits.critical_steps:
                return "critical_steps"
            if self.budget.tokens_spent:
                return "tokens"
            last = len(self.stages) + 1 >= limits.steps
            if last:
                self._tell(LAST_STEP)
            try:
                reply = await self._ask_in_context([] if last else self.tools.declarations, calls)
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
                self._tell(GO_ON)
                continue
            if last:
                return "steps"
            if calls.refused:
                return "tool_calls"
            await self._run_calls(reply.calls, calls)

    def _tell(self, text: str) -> None:
        """Adds a message to the model that is not the task's."""
        message: Message = {"role": "user", "content": text}
        self.messages.append(message)
        self._add("message", message=message)

    async def _ask_in_context(self, tools: Sequence[dict[str, Any]], calls: Calls) -> Reply:
        """Takes one step; where the prompt is too long for one, applies the strategy for that first."""
        agent = self.agent
        if agent.context == "keep":
            return await self._ask(tools)
        length = self._measure(tools)
        if length is not None and length[0] > prompt_limit(length[1], agent.limits.max_tokens, agent.threshold):
            self._make_room(tools, calls)
        try:
            return await self._ask(tools)
        except ContextLengthError:
            if not self._make_room(tools, calls):
                raise
        return await self._ask(tools)

    def _measure(self, tools: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
        return self.agent.model.measure(self.messages, tools, mode=self.agent.mode, last=self._last)

    def _make_room(self, tools: Sequence[dict[str, Any]], calls: Calls) -> bool:
        """Applies the strategy, and returns whether that changed anything."""
        shorter = STRATEGIES[self.agent.context](self.messages)
        if shorter == self.messages:
            return False
        before, cached = self._measure(tools), self._last.cached
        self.messages[:], self._last = shorter, Usage()
        calls.forget()
        after = self._measure(tools)
        self._add(
            "context",
            strategy=self.agent.context,
            before=before and before[0],
            after=after and after[0],
            cached_before=cached,
        )
        return True

    async def _ask(self, tools: Sequence[dict[str, Any]]) -> Reply:
        """Takes one step, and adds its message to the history."""
        begin = time.monotonic()
        mode = self.agent.mode
        reply = await self._ask_until_answered(tools)
        reply = replace(reply, calls=tuple(self._with_id(call, self.calls + n) for n, call in enumerate(reply.calls)))
        self.calls += len(reply.calls)
        self.budget.usage += reply.usage
        self._usage += reply.usage
        self._last = reply.usage
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

    async def _ask_until_answered(self, tools: Sequence[dict[str, Any]]) -> Reply:
        """Asks the model, and again where its server is busy. Raises what the model raises."""
        seed = None
        if self.seed is not None:  # one for each answer of each agent, whatever the order of their steps
            seed = zlib.crc32(f"{self.seed} {self.name} {len(self.stages)}".encode())
        agent, tried = self.agent, 0
        while True:
            begin = time.monotonic()
            try:
                return await agent.model(
                    self.messages, tools, mode=agent.mode, max_tokens=agent.limits.max_tokens, seed=seed
                )
            except BusyError as error:
                if error.too_many:
                    await self.budget.concurrency.halve(begin)
                if tried == RETRIES:
                    raise
                # Sub-agents that were refused together do not come back together
                wait = BACKOFF * 2**tried * random.uniform(1, 1.5) if error.after is None else error.after
                self._add("retry", error=str(error), wait=wait, concurrency=self.budget.concurrency.limit)
            await asyncio.sleep(wait)
            tried += 1

    def _with_id(self, call: Call, number: int) -> Call:
        """Returns a call whose id has the form that the model was trained on, unique in the conversation."""
        known = re.fullmatch(rf"functions\.{re.escape(call.name)}:\d+", call.id) and call.id not in self._ids
        call = call if known else replace(call, id=f"functions.{call.name}:{number}")
        self._ids.add(call.id)
        return call

    async def _run_calls(self, made: Sequence[Call], calls: Calls) -> None:
        """Runs the calls of one message at once, and adds their results in the order of the calls."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(calls.run(call)) for call in made]
        for call, task in zip(made, tasks, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": task.result()})

    def _add(self, event: str, **fields: Any) -> None:
        self.trace.add(event, self.name, self.parent, **fields)
