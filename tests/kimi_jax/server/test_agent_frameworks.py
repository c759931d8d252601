"""Agents of openai's own framework run chains of tools against the server, in both of OpenAI's APIs."""

import asyncio

import openai
import pytest

agents = pytest.importorskip("agents", reason="needs openai-agents")

STEPS = [("double", '{"number":3}'), ("double", '{"number":6}'), ("negate", '{"number":12}')]
CALL = (
    "{thought}</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{index}"
    "<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
)


@agents.function_tool
def double(number: int) -> str:
    """Doubles a number."""
    return f"double is {2 * number}"


@agents.function_tool
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
            agent = agents.Agent("counter", model=model, tools=[double, negate], instructions="Use the tools.")
            if not streamed:
                return await agents.Runner.run(agent, "Double 3 twice, then negate it.")
            result = agents.Runner.run_streamed(agent, "Double 3 twice, then negate it.")
            async for _ in result.stream_events():
                pass
            return result

    result = asyncio.run(run())
    assert result.final_output == "It is -12."
    assert len(served.engine.requests) == 4
    prompt = processor.tokenizer.decode(served.engine.requests[-1].tokens)
    for index, (name, arguments) in enumerate(STEPS):
        assert CALL.format(thought=f"<think>Thought {index}.", name=name, index=index, arguments=arguments) in prompt
    for found in ("double is 6", "double is 12", "negative is -12"):
        assert found in prompt
