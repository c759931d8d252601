"""Joins an engine and a folder's processor to the backend of a server, which itself knows no JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_jax.engine.engine import Engine
from kimi_jax.engine.requests import QueueFullError, Request
from kimi_jax.engine.stats import Stats
from kimi_jax.printable import printable
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling
from kimi_jax.server.backend import Prompt, Settings, Stream
from kimi_jax.server.errors import RequestError, failed, invalid, unavailable


class EngineBackend:
    """Makes prompts with a processor and answers them with an engine: a `kimi_jax.server.backend.Backend`.

    Raises FileNotFoundError or ValueError where the folder of a model with vision has no sound
    preprocessor_config.json.
    """

    def __init__(self, engine: Engine, processor: Processor):
        self.engine, self.processor = engine, processor
        self.tokenizer, self.template = processor.tokenizer, processor.template
        self.max_length = engine.sizes.max_length
        self.vocab_size = processor.config.text.vocab_size
        self.stop_ids = tuple(processor.config.stop_ids)
        if processor.config.vision is not None:
            _ = processor.media_config  # what is wrong in it is no request's fault

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        thinking: bool,
        preserve_thinking: bool,
        options: Mapping[str, Any],
    ) -> Prompt:
        """Returns a conversation's prompt. Strings in it open no file and no address."""
        try:
            found = self.processor(
                messages, tools, thinking, preserve_thinking=preserve_thinking, files=None, **options
            )
        except ValueError as error:
            folder = printable(self.processor.folder)
            raise invalid(str(error).replace(folder, "the model"), "messages") from None
        return Prompt(found.tokens[0].tolist(), found.media)

    def submit(self, prompt: Prompt, settings: Settings) -> Stream:
        """Takes in a request. Raises `RequestError`: 400 for what cannot be served, 429 where too many wait, 503 where
        the engine has failed or is closed."""
        try:
            request = Request(
                prompt.ids,
                max_new_tokens=settings.max_new_tokens,
                sampling=Sampling(**_numbers(settings.sampling)),
                seed=settings.seed,
                media=prompt.media,
                top_logprobs=settings.top_logprobs,
                banned=settings.banned,
                mask_provider=settings.mask_provider,
            )
            return self.engine.submit(request)
        except ValueError as error:
            raise invalid(str(error), str(error).split(" ", 1)[0]) from None
        except QueueFullError as error:
            raise RequestError(429, str(error), code="rate_limit_exceeded", retry_after=1) from None
        except RuntimeError:
            raise unavailable("the engine takes no requests") if self.failed else failed() from None

    def stats(self) -> Stats:
        """Returns the engine's counts of the moment."""
        return self.engine.stats()

    def fail(self, reason: str) -> None:
        """Ends all answers with an error, and takes no more requests."""
        self.engine.fail(RuntimeError(reason))

    @property
    def failed(self) -> bool:
        """True once the engine is closed or has died."""
        return self.engine.closed


def _numbers(values: Mapping[str, float | int]) -> dict[str, Any]:
    return {name: value if name == "top_k" else float(value) for name, value in values.items()}
