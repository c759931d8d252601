"""Text in and out: the tokenizer, chat prompts and tool declarations. No JAX here."""

from kimi_jax.text import chat
from kimi_jax.text.chat import declare_tools, encode, media_parts, render
from kimi_jax.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "chat", "declare_tools", "encode", "media_parts", "render"]
