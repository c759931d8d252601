"""From a sentence to an answer: the prompt, its tokens one after another, and their text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import checkpoints
from kimi_jax.config import KimiConfig
from kimi_jax.model.kimi import Kimi
from kimi_jax.processor import Processor, Prompt
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.drafts import DRAFT_TOKENS, Draft
from kimi_jax.runtime.generate import checked_lengths, stream
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.text.messages import Messages

MAX_NEW_TOKENS = 1024  # where nobody says: room for a short question's reasoning and answer


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    content: its text without reasoning, calls of tools and markers. Where the tokens ran out in the reasoning, or the
        model only called tools, it is empty.
    reasoning: the text inside `<think>`, None where there is none.
    token_ids: every new token, the one that ended the answer included.
    finish_reason: "length" where there were no more tokens to be had, else "tool_calls" where the model called tools,
        else "stop".
    tool_calls: the calls, in OpenAI's schema, as a message of the conversation has them.
    """

    content: str
    reasoning: str | None
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "tool_calls"]
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


def answer(
    model: Kimi | str | Path,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    files: str | Path | None = None,
    seed: int = 0,
    processor: Processor | None = None,
    draft: Draft | None = None,
    draft_tokens: int = DRAFT_TOKENS,
) -> Answer:
    """Answers a text, or a conversation in OpenAI's schema.

    model: a model that `load` gave, or the folder of a checkpoint, which is then loaded for this one answer.
    messages, tools, thinking, images, videos, files: as `Processor` takes them.
    sampling: None is `Sampling.from_folder`: what generation_config.json says, greedy where it says nothing.
    max_new_tokens: None is 1,024, or as many as the model's positions leave after the prompt.
    seed: as for `generate`; the same arguments give the same answer.
    processor: the one to use for many answers of a model; None makes one of the model's folder, which takes a second.
    draft, draft_tokens: as for `generate`; the answer is the same.

    Raises ValueError or OSError naming the file, message, field or argument that is wrong (before weights are read,
    where it is not in them), and ValueError where logits are not finite.
    """
    if processor is None:
        processor = Processor.from_folder(_folder(model))
    prompt = processor(messages, tools, thinking, images=images, videos=videos, files=files)
    max_new_tokens = checked_max_new_tokens(processor.config, prompt, max_new_tokens)
    if sampling is None:
        sampling = Sampling.from_folder(processor.folder)
    columns = stream(
        model if isinstance(model, Kimi) else checkpoints.load(model),
        prompt.tokens,
        media=prompt.media,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        draft=draft,
        draft_tokens=draft_tokens,
    )
    ids: list[int] = []
    finish = Finish.NOT_YET
    for column in columns:
        finish = Finish(column.finish[0])
        if finish == Finish.NOT_FINITE:
            raise ValueError(f"the logits after {len(ids)} new tokens are not finite (NaN or infinity)")
        ids.append(int(column.tokens[0]))
    reason: Literal["stop", "length"] = "stop" if finish == Finish.STOP else "length"
    parsed = processor.parse(ids, thinking, tools, reason, prompt=prompt.tokens[0])
    return Answer(
        content=parsed.content or "",
        reasoning=parsed.reasoning,
        token_ids=tuple(ids),
        finish_reason=parsed.finish_reason,
        tool_calls=parsed.tool_calls,
    )


def checked_max_new_tokens(config: KimiConfig, prompt: Prompt, max_new_tokens: int | None) -> int:
    """Returns how many tokens an answer to `prompt` may have, with None as `answer` reads it.

    Raises ValueError where the model has not as many positions after the prompt.
    """
    if max_new_tokens is None:
        room = config.text.max_position_embeddings - prompt.tokens.shape[1]
        max_new_tokens = max(1, min(MAX_NEW_TOKENS, room))
    checked_lengths(config, prompt.tokens, None, max_new_tokens)
    return max_new_tokens


def _folder(model: Kimi | str | Path) -> str | Path:
    if not isinstance(model, Kimi):
        return model
    if model.config.folder is None:
        raise ValueError("the model was not loaded from a folder, so that answer() needs processor=")
    return model.config.folder
