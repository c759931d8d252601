"""A model in this process: agents are rows of one batch of an engine, and share what is computed of their prompts."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_jax.agents.model import Call, ContextLengthError, Message, Mode, Reply, Usage

if TYPE_CHECKING:
    from kimi_jax.engine import Engine
    from kimi_jax.engine.mask_provider import MaskProvider
    from kimi_jax.processor import Processor, Prompt
    from kimi_jax.runtime.sampling import Sampling

PAGE = 128  # tokens; a shorter beginning is not shared
NO_PICTURE = "[A picture, which this model cannot see.]"


class EngineModel:
    """Asks the model of an engine, whose prompts `processor` makes. All calls come from one event loop.

    sampling: how tokens are drawn by mode; None is what Moonshot recommends for each.
    seed: the seed of the first answer. Each further answer takes the next one.
    """

    def __init__(
        self,
        engine: "Engine",
        processor: "Processor",
        sampling: "Mapping[Mode, Sampling] | None" = None,
        *,
        seed: int = 0,
    ):
        self.engine, self.processor, self.sampling, self.seed = engine, processor, sampling, seed
        self._prefills: list[tuple[np.ndarray, asyncio.Event]] = []  # prompts without their first new token yet
        self._newest: tuple[tuple[list[Message], list[Mapping[str, Any]], bool], Prompt] | None = None

    def __str__(self) -> str:
        return self.processor.folder.name

    async def __call__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        mode: Mode,
        max_tokens: int,
        seed: int | None = None,
    ) -> Reply:
        """Returns the model's answer. Cancelling it frees the row.

        Raises ContextLengthError, ValueError for messages that make no prompt, and RuntimeError where the engine fails.
        """
        from kimi_jax.engine import Request
        from kimi_jax.runtime.sampling import Sampling

        thinking = mode != "instant"
        prompt = self._prompt(messages, tools, thinking)
        ids = prompt.tokens[0]
        longest = self.engine.sizes.max_length
        if len(ids) >= longest:
            raise ContextLengthError(f"the prompt has {len(ids)} tokens; with the answer the engine holds {longest}")
        sampling = Sampling.recommended(thinking) if self.sampling is None else self.sampling[mode]
        if seed is None:
            seed, self.seed = self.seed, self.seed + 1
        max_tokens = min(max_tokens, longest - len(ids))
        request = Request(
            ids,
            max_new_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            media=prompt.media,
            mask_provider=self.mask_provider(messages, tools, thinking=thinking, max_tokens=max_tokens),
        )
        await self._wait_for_siblings(ids)
        stream = self.engine.submit(request)
        entry = (ids, asyncio.Event())
        self._prefills.append(entry)
        new: list[int] = []
        try:
            async for event in stream:
                entry[1].set()
                new += event.tokens
        finally:
            entry[1].set()
            self._prefills = [one for one in self._prefills if one is not entry]
            await stream.aclose()
        if event.finish_reason not in ("stop", "length") or event.usage is None:
            raise RuntimeError(f"the answer ended by {event.finish_reason!r}: {event.error}") from self.engine.failure
        finish = event.finish_reason
        parsed = self.processor.parse(new, thinking, list(tools), finish, prompt=ids)
        calls = tuple(Call(one["id"], **one["function"]) for one in parsed.tool_calls)
        usage = Usage(event.usage.prompt_tokens, event.usage.cached_tokens, event.usage.completion_tokens)
        return Reply(parsed.content, parsed.reasoning, calls, usage, parsed.finish_reason)

    def mask_provider(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, thinking: bool, max_tokens: int
    ) -> "MaskProvider | None":
        """Returns a new provider of masks for the answer to a prompt, for a subclass that holds answers to a form; None
        allows all tokens."""
        return None

    def measure(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, mode: Mode, last: Usage
    ) -> tuple[int, int]:
        """Returns the tokens of a prompt by the model's template, and those that the engine holds with the answer."""
        return len(self._prompt(messages, tools, mode != "instant").tokens[0]), self.engine.sizes.max_length

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], thinking: bool) -> "Prompt":
        """Returns the prompt of a conversation. A prompt that was measured is not made again to be asked."""
        asked = (list(messages), list(tools), thinking)
        if self._newest is None or self._newest[0] != asked:
            takes_pictures = self.processor.config.vision is not None
            shown = asked[0] if takes_pictures else [_without_pictures(message) for message in asked[0]]
            self._newest = (asked, self.processor(shown, asked[1] or None, thinking))
        return self._newest[1]

    async def _wait_for_siblings(self, ids: np.ndarray) -> None:
        """Waits while a beginning that another prompt shares with this one is being computed for that one."""
        for other, begun in list(self._prefills):
            shared = _shared(ids, other, self.processor.config.media_placeholder_token_id)
            whole = shared // PAGE * PAGE
            if whole and not begun.is_set() and not self.engine.prefix_ready(ids[:whole]):
                await begun.wait()


def _without_pictures(message: Message) -> Message:
    """Returns a message as a model without a vision tower takes it: a tool's pictures are named, not shown."""
    if message["role"] != "tool" or isinstance(message["content"], str):
        return message
    parts = [one if one["type"] == "text" else {"type": "text", "text": NO_PICTURE} for one in message["content"]]
    return {**message, "content": parts}


def _shared(a: np.ndarray, b: np.ndarray, placeholder: int | None) -> int:
    """Returns how many tokens two prompts have in common from the first on, and before any picture."""
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]) | (a[:length] == placeholder)
    return int(np.argmax(differ)) if differ.any() else length
