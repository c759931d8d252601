"""Many requests at once on one model: pages, prefixes computed once, a scheduler, and the loop over them."""

from kimi_jax.engine.engine import Engine as Engine
from kimi_jax.engine.hosts import follow as follow
from kimi_jax.engine.mask_provider import MaskProvider as MaskProvider
from kimi_jax.engine.requests import Event as Event
from kimi_jax.engine.requests import QueueFullError as QueueFullError
from kimi_jax.engine.requests import Request as Request
from kimi_jax.engine.requests import Result as Result
from kimi_jax.engine.requests import Times as Times
from kimi_jax.engine.requests import TokenLogprobs as TokenLogprobs
from kimi_jax.engine.requests import Usage as Usage
from kimi_jax.engine.stats import Stats as Stats
from kimi_jax.engine.stream import Stream as Stream
