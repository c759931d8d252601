"""Runs an engine in each of several replicas behind Ray Serve, whose prefix-aware router sends a prompt to the replica
that has most of its beginning.

    pip install "ray[serve]" pyarrow pandas
    python examples/ray_serve.py FOLDER "A prompt" "Another prompt" --replicas 2

It starts Ray on this machine, prints a line of JSON for each answer, and stops Ray. On a cluster the same deployment
has one replica for each slice: set the resources of a slice in `ray_actor_options`, and the mesh in `Replica`. A
replica is one process here; a slice of several hosts needs `kimi_jax.links` between them.
"""

import argparse
import asyncio
import dataclasses
import importlib
import json
import os
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

# The public name, in ray.serve.llm, needs vLLM to be installed, the router itself does not.
PREFIX_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:PrefixCacheAffinityRouter"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer. The router reads the attribute `prompt`."""

    prompt: str
    max_new_tokens: int = 24


class Replica:
    """One engine, with as many requests at once as it has slots and a few that wait."""

    def __init__(self, folder: str, slots: int = 4, cache_memory: str | None = None, prefill_chunk: int = 512):
        import kimi_jax
        from kimi_jax.processor import Processor

        self.processor = Processor.from_folder(folder)
        self.engine = kimi_jax.Engine(
            kimi_jax.load(folder), slots=slots, cache_memory=cache_memory, prefill_chunk=prefill_chunk
        )

    def check_health(self) -> None:
        """Raises where the engine has failed; Ray Serve then starts another replica."""
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.engine.failure}")

    async def __call__(self, prompt: Prompt) -> dict[str, Any]:
        """Answers a prompt."""
        import kimi_jax

        tokens = self.processor(prompt.prompt).tokens[0]
        answer: list[int] = []
        async for event in self.engine.submit(kimi_jax.Request(tokens, max_new_tokens=prompt.max_new_tokens)):
            answer += event.tokens
        if event.usage is None or event.error is not None:
            raise RuntimeError(event.error or "the request was cancelled")
        content = self.processor.decode(answer)
        return {"content": content, "cached_tokens": event.usage.cached_tokens, "replica": os.getpid()}


def router() -> RequestRouterConfig:
    """Returns the prefix-aware router where this version of Ray has it, else the default one."""
    module, _, name = PREFIX_ROUTER.partition(":")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return RequestRouterConfig()
    return RequestRouterConfig(request_router_class=PREFIX_ROUTER)


def application(folder: str, replicas: int, **engine: Any) -> Any:
    """Returns the application for `serve.run`; `engine` are arguments of `Replica`."""
    deployment = serve.deployment(
        Replica,
        num_replicas=replicas,
        max_ongoing_requests=2 * engine.get("slots", 4),
        request_router_config=router(),
    )
    return deployment.bind(folder, **engine)


def main() -> None:
    """Answers the prompts of the command line."""
    parser = argparse.ArgumentParser(description="Answers prompts by several replicas behind Ray Serve.")
    parser.add_argument("folder", help="a checkpoint's folder, converted or published")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--cache-memory", default="64MiB", help="memory of each replica's cache")
    parser.add_argument("--prefill-chunk", type=int, default=512)
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("slots", "cache_memory", "prefill_chunk")}

    async def answer(handle: Any) -> list[dict[str, Any]]:
        prompts = [Prompt(prompt, arguments.max_new_tokens) for prompt in arguments.prompts]
        return await asyncio.gather(*(handle.remote(prompt) for prompt in prompts))

    try:
        handle = serve.run(application(arguments.folder, arguments.replicas, **options), route_prefix=None)
        for result in asyncio.run(answer(handle)):
            print(json.dumps(result), flush=True)
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
