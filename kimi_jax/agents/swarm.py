"""A swarm: an agent that makes configurations of sub-agents and starts them side by side (Kimi K2.5, App. E.8)."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from kimi_jax.agents.limits import Limits
from kimi_jax.agents.loop import Agent, Conversation
from kimi_jax.agents.model import ChatModel, Mode
from kimi_jax.agents.tools import Tool, ToolError

SYSTEM = (
    "You direct a task. create_subagent defines a kind of helper; assign_task gives one a task and returns its answer. "
    "Delegate what is independent, and give each helper all that it needs: it sees nothing of this conversation. Check "
    "what comes back. Your message without a call is the final answer."
)

LIMITS = Limits(steps=15)  # the orchestrator's steps on BrowseComp


def swarm(
    model: ChatModel,
    tools: Sequence[Tool] = (),
    *,
    system: str | None = SYSTEM,
    mode: Mode = "thinking",
    limits: Limits = LIMITS,
) -> Agent:
    """Returns an agent that may hand tasks to sub-agents, which have its tools and cannot start others.

    Raises what `Agent` raises.
    """
    return Agent(model, tools, system, mode, limits, _swarm_tools)


def _swarm_tools(main: Conversation) -> list[Tool]:
    """Returns the two tools of one orchestrator's run; the names are those that the weights were trained with."""
    prompts: dict[str, str] = {}
    launched: dict[str, int] = {}
    limits = main.agent.limits

    async def create_subagent(name: str, system_prompt: str) -> str:
        if name in prompts:
            raise ToolError(f"the sub-agent {name!r} exists already")
        prompts[name] = system_prompt
        return f"The sub-agent {name!r} can be given tasks now."

    async def assign_task(agent: str, prompt: str) -> str:
        if agent not in prompts:
            raise ToolError(f"no sub-agent {agent!r}; there are {', '.join(prompts) or 'none yet'}")
        if main.budget.subagents >= limits.subagents:
            raise ToolError(f"the budget of {limits.subagents} sub-agents is spent; answer with what you have")
        main.budget.subagents += 1
        launched[agent] = launched.get(agent, 0) + 1
        name = f"{main.prefix}{agent}#{launched[agent]}"
        own = replace(limits, steps=limits.sub_steps, critical_steps=None)
        worker = replace(main.agent, system=prompts[agent], limits=own, run_tools=None)
        steps = main.stages[-1][1]
        async with main.budget.concurrency:
            main.trace.add("spawn", main.name, main.parent, id=name, configuration=agent)
            conversation = Conversation(
                worker, prompt, main.budget, main.trace, name, main.name, is_root=False, seed=main.seed
            )
            try:
                async with asyncio.timeout(limits.sub_time) as clock:
                    run = await conversation.run()
            except TimeoutError:
                if clock.expired():
                    raise ToolError(f"assign_task took longer than {limits.sub_time:g} s") from None
                raise
            finally:
                steps.append(len(conversation.stages))
        if run.error is not None:
            raise run.error
        return run.answer if run.stop == "answer" else f"{run.answer}\n[stopped by its limit: {run.stop}]".lstrip()

    def declare(run, description: str, **parameters: str) -> Tool:
        properties = {name: {"type": "string", "description": text} for name, text in parameters.items()}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(parameters),
            "additionalProperties": False,
        }
        # Sub-agents are bounded by their own number and time, and the tools that they call by the budget
        return Tool(run.__name__, description, schema, run, timeout=None, counts=False)

    return [
        declare(
            create_subagent,
            "Define a kind of sub-agent under a name of its own. It can then be given any number of tasks.",
            name="A name that no other sub-agent has",
            system_prompt="Its role, its abilities and where they end",
        ),
        declare(
            assign_task,
            "Start a new agent of a defined kind on a task. Start several in one message where that is faster. Each "
            "returns a single message when it is done.",
            agent="The name given to create_subagent",
            prompt="The task, with all that is needed to do it",
        ),
    ]
