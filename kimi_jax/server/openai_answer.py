"""Writes answers as the objects of OpenAI's API, whole and in pieces."""

import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from kimi_jax.server.backend import TokenLogprobs
from kimi_jax.server.counts import Usage, add, total
from kimi_jax.server.run import Part, Run, Whole
from kimi_jax.text import Tokenizer
from kimi_jax.text.answers import Delta


class Answer:
    """Names one answer, and writes its objects: its id, time and model are in each of them."""

    def __init__(self, model: str, tok: Tokenizer, kind: str):
        self.tok, self.is_chat = tok, kind == "chat"
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Whole], prompts: int = 1) -> dict[str, Any]:
        """Returns the whole answer; the choices of several prompts stand one after another."""
        each = len(choices) // prompts
        starts = range(0, len(choices), each)
        counts = [total([one.end.usage for one in choices[start : start + each]]) for start in starts]
        return {
            **self.head,
            "choices": [self._choice(index, one) for index, one in enumerate(choices)],
            "usage": usage_object(add(counts)),
        }

    async def pieces(self, runs: Sequence[Run], include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the chunks of an answer, the runs one after another."""
        if self.is_chat:
            self.head["object"] = "chat.completion.chunk"
        usages: list[Usage] = []
        for number, run in enumerate(runs):
            each = len(run.generation.settings)
            if self.is_chat:
                for index in range(each):
                    yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)
            ends: list[Usage] = []
            async with contextlib.aclosing(run.parts()) as parts:
                async for part in parts:
                    for chunk in self._of_part(part, number * each):
                        yield chunk
                    if part.end is not None:
                        ends.append(part.end.usage)
            usages.append(total(ends))
        if include_usage:
            yield {**self.head, "choices": [], "usage": usage_object(add(usages))}

    def _of_part(self, part: Part, first: int) -> Iterator[dict[str, Any]]:
        """Yields a chunk for each delta; the first has the logprobs, the last the reason and, as Moonshot has it, the
        usage of its choice."""
        logprobs = self._logprobs(part.logprobs)
        for delta in part.deltas:
            choice = {"delta": _delta(delta)} if self.is_chat else {"text": delta.content or ""}
            usage = part.end.usage if part.end is not None and delta.finish_reason is not None else None
            yield self._chunk(first + part.choice, choice, delta.finish_reason, logprobs, usage)
            logprobs = None

    def _chunk(
        self, index: int, choice: dict[str, Any], finish: str | None, logprobs: Any, usage: Usage | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **choice, "logprobs": logprobs, "finish_reason": finish}
        if usage is not None:
            choice["usage"] = usage_object(usage)
        return {**self.head, "choices": [choice]}

    def _choice(self, index: int, one: Whole) -> dict[str, Any]:
        parsed = one.parsed
        said: dict[str, Any] = {"text": parsed.content or ""}
        if self.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
            if parsed.content is None and not parsed.tool_calls:
                message["content"] = ""
            if parsed.reasoning is not None:
                message["reasoning_content"] = parsed.reasoning
            if parsed.tool_calls:
                message["tool_calls"] = parsed.tool_calls
            said = {"message": message}
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(one.logprobs),
            "finish_reason": one.end.finish_reason,
        }

    def _logprobs(self, logprobs: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        if self.is_chat:
            content = [
                self._token(token, found.logprob) | {"top_logprobs": [self._token(*one) for one in found.top]}
                for token, found in logprobs
            ]
            return {"content": content, "refusal": None}
        texts = [self.tok.decode([token]) for token, _ in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [found.logprob for _, found in logprobs],
            "top_logprobs": [{self.tok.decode([token]): value for token, value in found.top} for _, found in logprobs],
            "text_offset": [0, *itertools.accumulate(map(len, texts[:-1]))],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tok.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Returns OpenAI's object of counts, with Moonshot's `cached_tokens` beside them."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "cached_tokens": usage.cached,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.reasoning is not None:
        return {"reasoning_content": delta.reasoning}
    if delta.content is not None:
        return {"content": delta.content}
    if delta.tool_calls:
        return {"tool_calls": delta.tool_calls}
    return {}
