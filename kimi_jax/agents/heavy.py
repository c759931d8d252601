"""Kimi's Heavy mode: several runs of one task side by side, and one more that makes the final answer of theirs.

Moonshot states that eight runs are aggregated (K2-Thinking's launch post) and publishes neither prompt nor format: both
are ours.
"""

import asyncio
import collections
from dataclasses import dataclass, replace

from kimi_jax.agents.context import prompt_limit
from kimi_jax.agents.limits import Budget
from kimi_jax.agents.loop import Agent, Conversation, Run
from kimi_jax.agents.model import Content, Message, Usage
from kimi_jax.agents.trace import Trace

ANSWER_LENGTH = 50_000  # characters of an answer in the prompt of the merge, fewer where that is too long
MERGE = (
    "Several attempts were made at the task above, independently of each other. Their final answers follow. Compare "
    "them, find out where they differ and which is right, and give one final answer to the task. It need not be one of "
    "theirs."
)


@dataclass(frozen=True)
class Heavy:
    """The result of several runs of a task, in the order of their seeds, and of the run that merged their answers.

    agreement: how many runs gave the most frequent answer, whatever its case, spaces and final full stop.
    usage: tokens of all runs.
    """

    runs: list[Run]
    merged: Run
    agreement: int
    usage: Usage

    @property
    def answer(self) -> str:
        """The merged answer."""
        return self.merged.answer

    @property
    def critical_steps(self) -> int:
        """The steps of the longest chain: those of the longest run, and the merge."""
        return max(run.critical_steps for run in self.runs) + 1


async def heavy(agent: Agent, task: Content, n: int = 8, *, trace: Trace | None = None) -> Heavy:
    """Runs a task n times at once with the seeds 0 to n - 1, and merges the final answers.

    Limits hold for each run, but an orchestrator's budget of tool calls is split evenly. In the trace the runs are
    "run#0" and so on, and the merge is "main".

    Raises ValueError for n below 1, and RuntimeError where no run or the merge has no answer.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 run")
    trace = trace or Trace()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for seed in range(n):
            limits = agent.limits
            if agent.run_tools is not None and limits.tool_calls is not None:
                share, rest = divmod(limits.tool_calls, n)
                limits = replace(limits, tool_calls=share + (seed < rest))
            name = f"run#{seed}"
            trace.add("spawn", "main", None, id=name, configuration="run")
            own = replace(agent, limits=limits)
            one = Conversation(own, task, Budget(limits), trace, name, "main", seed=seed)
            tasks.append(group.create_task(one.run()))
    runs = [one.result() for one in tasks]
    if all(run.stop != "answer" for run in runs):
        error = next((run.error for run in runs if run.error is not None), None)
        raise RuntimeError(f"none of {n} runs has an answer: {', '.join(run.stop for run in runs)}") from error
    judge = Agent(agent.model, (), agent.system, "thinking", agent.limits)
    merged = await judge.run(_merge_task(judge, task, runs), trace=trace, seed=n)
    if merged.stop != "answer":
        raise RuntimeError(f"the merge of {n} runs has no answer: {merged.stop}") from merged.error
    usage = sum((run.usage for run in runs), merged.usage)
    return Heavy(runs, merged, _agreement(runs), usage)


def _merge_task(judge: Agent, task: Content, runs: list[Run]) -> Content:
    """Returns the task of the merge, its answers cut so that its prompt fits the model's context."""
    length = ANSWER_LENGTH
    while True:
        answers = (
            _cut(run.answer, length) if run.stop == "answer" else f"(none: this attempt ended by {run.stop})"
            for run in runs
        )
        text = MERGE + "".join(f"\n\nAnswer {number}:\n{answer}" for number, answer in enumerate(answers, 1))
        merged: Content = (
            f"{task}\n\n{text}" if isinstance(task, str) else [*task, {"type": "text", "text": f"\n\n{text}"}]
        )
        system: list[Message] = [] if judge.system is None else [{"role": "system", "content": judge.system}]
        messages = [*system, {"role": "user", "content": merged}]
        found = judge.model.measure(messages, [], mode=judge.mode, last=Usage())
        if found is None or found[0] <= prompt_limit(found[1], judge.limits.max_tokens, 1.0) or length < 100:
            return merged
        length //= 2


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}\n[... {len(text) - length} characters left out]"


def _agreement(runs: list[Run]) -> int:
    answers = (" ".join(run.answer.casefold().split()).rstrip(".") for run in runs if run.stop == "answer")
    return collections.Counter(answers).most_common(1)[0][1]
