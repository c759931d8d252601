"""Agents of two frameworks, openai-agents and Pydantic AI, and our own run chains of tools against the server, in the
APIs that each speaks."""

import asyncio
import json

import anthropic
import openai
import pytest

from kimi_jax import agents as own_agents

agents = pytest.importorskip("agents", reason="needs openai-agents")
pydantic_ai = pytest.importorskip("pydantic_ai", reason="needs pydantic-ai-slim")

STEPS = [("double", '{"number":3}'), ("double", '{"number":6}'), ("negate", '{"number":12}')]
CALL = (
    "{thought}</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}"
    "<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
)


def double(number: int) -> str:
    """Doubles a number."""
    return f"double is {2 * number}"


def negate(number: int) -> str:
    """Negates a number."""
    return f"negative is {-number}"


def script(processor):
    """Returns what makes an engine answer the n-th request of a chain with its n-th step, then with a text."""

    def answer(request):
        done = processor.tokenizer.decode(request.tokens).count("<|tool_call_begin|>")
        if done == len(STEPS):
            text = "Thought 3.</think>It is -12.<|im_end|>"
        else:
            name, arguments = STEPS[done]
            text = CALL.format(thought=f"Thought {done}.", name=name, index=done, arguments=arguments)
        ids = processor.tokenizer.encode(text)
        return lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else None

    return answer


def check(processor, requests, write=str):
    """Checks that the last of a chain's requests has every step of it as the model wrote it, reasoning included, with
    the arguments as `write` has them."""
    assert len(requests) == 4
    prompt = processor.tokenizer.decode(requests[-1].tokens)
    for index, (name, arguments) in enumerate(STEPS):
        step = {"thought": f"<think>Thought {index}.", "name": name, "index": index, "arguments": write(arguments)}
        assert CALL.format(**step) in prompt
    for found in ("double is 6", "double is 12", "negative is -12"):
        assert found in prompt


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_chain_of_three_tools_completes_and_keeps_its_reasoning(served, processor, api, streamed):
    served.engine.answer = script(processor)
    agents.set_tracing_disabled(True)

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{served.listener.url}/v1", api_key="none") as client:
            if api == "responses":
                model = agents.OpenAIResponsesModel("kimi-toy", client)
            else:
                model = agents.OpenAIChatCompletionsModel(
                    "kimi-toy", client, should_replay_reasoning_content=lambda context: True
                )
            tools = [agents.function_tool(double), agents.function_tool(negate)]
            agent = agents.Agent("counter", model=model, tools=tools, instructions="Use the tools.")
            if not streamed:
                return await agents.Runner.run(agent, "Double 3 twice, then negate it.")
            result = agents.Runner.run_streamed(agent, "Double 3 twice, then negate it.")
            async for _ in result.stream_events():
                pass
            return result

    result = asyncio.run(run())
    assert result.final_output == "It is -12."
    check(processor, served.engine.requests)


def test_a_chain_of_our_own_agent_completes_and_keeps_its_reasoning(served, processor):
    served.engine.answer = script(processor)

    async def run():
        model = own_agents.OpenAIModel.at(f"{served.listener.url}/v1", "kimi-toy")
        async with model.client:
            tools = [own_agents.tool(double), own_agents.tool(negate)]
            return await own_agents.Agent(model, tools).run("Double 3 twice, then negate it."), model.context_length

    done, length = asyncio.run(run())
    assert (done.answer, done.stop, done.steps) == ("It is -12.", "answer", 4)
    thoughts = [one["reasoning_content"] for one in done.messages if one["role"] == "assistant"]
    assert thoughts == [f"Thought {index}." for index in range(4)]
    assert length == served.service.backend.max_length  # as the server's list of models has it
    check(processor, served.engine.requests)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_a_chain_of_pydantic_ai_completes_and_keeps_its_reasoning(served, processor, api, streamed):
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.moonshotai import MoonshotAIProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    served.engine.answer = script(processor)
    said = "Double 3 twice, then negate it."

    async def run():
        url, settings = served.listener.url, None
        make = {"base_url": url if api == "messages" else f"{url}/v1", "api_key": "none"}
        async with anthropic.AsyncAnthropic(**make) if api == "messages" else openai.AsyncOpenAI(**make) as client:
            if api == "messages":
                model = AnthropicModel("kimi-toy", provider=AnthropicProvider(anthropic_client=client))
                settings = {"max_tokens": 100, "anthropic_thinking": {"type": "enabled", "budget_tokens": 60}}
            elif api == "responses":
                model = OpenAIResponsesModel("kimi-toy", provider=OpenAIProvider(openai_client=client))
            else:
                model = OpenAIChatModel("kimi-toy", provider=MoonshotAIProvider(openai_client=client))
            agent = pydantic_ai.Agent(model, tools=[double, negate], model_settings=settings)
            if not streamed:
                return (await agent.run(said)).output
            async with agent.run_stream(said) as result:
                return await result.get_output()

    assert asyncio.run(run()) == "It is -12."
    # (Anthropic's API has arguments as objects, whose spelling is lost)
    check(processor, served.engine.requests, (lambda text: json.dumps(json.loads(text))) if api == "messages" else str)
