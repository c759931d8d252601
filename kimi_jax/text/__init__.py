"""Turns conversations into token ids and ids into text: tokenizer, chat prompts, tool declarations. Imports no JAX."""

from kimi_jax.text import chat
from kimi_jax.text.chat import declare_tools, encode, media_parts, render
from kimi_jax.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "chat", "declare_tools", "encode", "media_parts", "render"]
