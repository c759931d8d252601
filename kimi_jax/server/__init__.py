"""Answers requests over HTTP, in the APIs of OpenAI and Anthropic. Imports no JAX: it talks to a `Backend`."""

from kimi_jax.server.app import Service as Service
from kimi_jax.server.gate import Limits as Limits
from kimi_jax.server.listener import Listener as Listener
