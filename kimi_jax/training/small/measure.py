"""Measures a small model: what it writes, greedy, through its published folder and the engine, in conversations that
are held out from training."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
from kimi_jax.engine import Engine, Request
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.training.small.recipe import Conversation, SmallRecipe

SEED = 1000  # far from those of training
MOST_NEW = 64  # tokens of an answer


def measure(recipe: SmallRecipe, folder: Path, count: int = 500, *, slots: int = 16) -> dict[str, float]:
    """Returns by name the share of `count` conversations in which every message of the assistant is as it should be:
    the same reasoning, the same content, the same calls of tools."""
    processor = Processor.from_folder(folder)
    engine = Engine(
        checkpoints.load(folder),
        slots=slots,
        prefill_chunk=128,
        max_length=max(stage.room.tokens for stage in recipe.stages) + MOST_NEW,
    )
    try:
        return {
            name: asyncio.run(_share([draw(np.random.default_rng((SEED, i))) for i in range(count)], engine, processor))
            for name, draw in recipe.measures.items()
        }
    finally:
        engine.close()


async def _share(conversations: list[Conversation], engine: Engine, processor: Processor) -> float:
    right = await asyncio.gather(*(is_right(one, engine, processor) for one in conversations))
    return sum(right) / len(right)


async def is_right(conversation: Conversation, engine: Engine, processor: Processor) -> bool:
    """Tells whether the model writes every message of the assistant as the conversation has it."""
    messages, tools, thinking = conversation["messages"], conversation.get("tools"), conversation["thinking"]
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not await _writes(
            message, messages[:index], tools, thinking, engine, processor
        ):
            return False
    return True


async def _writes(
    expected: dict[str, Any], before: list[Any], tools: Any, thinking: bool, engine: Engine, processor: Processor
) -> bool:
    prompt = processor(before, tools, thinking)
    request = Request(
        prompt.tokens[0].tolist(), media=prompt.media, max_new_tokens=MOST_NEW, sampling=Sampling(temperature=0.0)
    )
    ids = [token async for event in engine.submit(request) for token in event.tokens]
    found = processor.parse(ids, thinking, tools)
    reasoning = expected["reasoning_content"] if thinking else None
    return (found.reasoning, found.content or "", [call["function"] for call in found.tool_calls or ()]) == (
        reasoning,
        expected["content"],
        [call["function"] for call in expected.get("tool_calls", ())],
    )
