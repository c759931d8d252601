"""Moonshot's Kimi models in JAX and Flax: the public names, each loaded when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints.loading import load as load
    from kimi_jax import media as media
    from kimi_jax import small as small
    from kimi_jax import training as training
    from kimi_jax.answering import Answer as Answer
    from kimi_jax.answering import answer as answer
    from kimi_jax.engine.engine import Engine as Engine
    from kimi_jax.engine.requests import Request as Request
    from kimi_jax.model.kimi import Kimi as Kimi
    from kimi_jax.model.splice import Media as Media
    from kimi_jax.processor import Processor as Processor
    from kimi_jax.processor import Prompt as Prompt
    from kimi_jax.runtime.generate import generate as generate
    from kimi_jax.runtime.generate import stream as stream
    from kimi_jax.runtime.sampling import Sampling as Sampling
    from kimi_jax.text import Tokenizer as Tokenizer
    from kimi_jax.text import chat as chat

_HOMES = {
    "Answer": "kimi_jax.answering",
    "Engine": "kimi_jax.engine.engine",
    "Kimi": "kimi_jax.model.kimi",
    "Media": "kimi_jax.model.splice",
    "Processor": "kimi_jax.processor",
    "Prompt": "kimi_jax.processor",
    "Request": "kimi_jax.engine.requests",
    "Sampling": "kimi_jax.runtime.sampling",
    "Tokenizer": "kimi_jax.text.tokenizer",
    "answer": "kimi_jax.answering",
    "generate": "kimi_jax.runtime.generate",
    "load": "checkpoints",
    "stream": "kimi_jax.runtime.generate",
}
_MODULES = {
    "chat": "kimi_jax.text.chat",
    "decoding": "kimi_jax.runtime.generate",
    "media": "kimi_jax.media",
    "small": "kimi_jax.small",
    "training": "kimi_jax.training",
}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kimi_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
