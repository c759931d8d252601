"""Runs an engine as one of several processes, and writes the answers to `requests` as JSON, for
test_engine_on_hosts.py. Arguments: the checkpoint's folder, a mesh, the coordinator, the number of processes and this
one's, and perhaps the folder of a draft head."""

import asyncio
import json
import sys

import cases
import jax.numpy as jnp
import numpy as np

import kimi_jax
from checkpoints import load_head
from kimi_jax.engine import follow
from kimi_jax.model.splice import tokens_per_item
from kimi_jax.processes import joined
from sharding import make_mesh

LENGTHS = (5, 150, 300, 129, 40, 256)


def requests(config):
    """Returns requests of several lengths, two with a picture where the model takes any, one of them drawn."""
    random = np.random.RandomState(1)
    prompts = [random.randint(0, 500, length).astype(np.int32) for length in LENGTHS]
    media = [None] * len(prompts)
    if config.vision is not None:
        grid = np.array([[1, 8, 8]], np.int32)
        count = int(tokens_per_item(grid, config).sum())
        for number, scale in ((2, 1.0), (4, -1.0)):
            prompts[number][7 : 7 + count] = config.media_placeholder_token_id
            media[number] = kimi_jax.Media(cases.media(grid[0]) * scale, grid)
    drawn = [kimi_jax.Sampling(1.5 if number == 1 else 0.0) for number in range(len(prompts))]
    return [
        kimi_jax.Request(prompt, max_new_tokens=10, sampling=sampling, seed=3, stop_ids=(), media=each)
        for prompt, sampling, each in zip(prompts, drawn, media, strict=True)
    ]


class Echo:
    """Drafts the last two tokens, which is hardly ever right: every step verifies drafts."""

    def propose(self, tokens, count):
        return tokens[-2:]


def answers(model, **options):
    """Returns the tokens of each request, all at once, and of the longest once more; and the tokens that it finds in
    the cache."""

    async def read(engine, request):
        return [token async for event in engine.submit(request) for token in event.tokens]

    async def everybody(engine):
        return await asyncio.gather(*(read(engine, request) for request in requests(model.config)))

    with kimi_jax.Engine(model, slots=4, cache_memory="600KiB", prefill_chunk=64, **options) as engine:
        programs = engine.stats().compiled_programs
        tokens = asyncio.run(everybody(engine))
        engine.answer(requests(model.config)[2])  # whose pages others may have taken meanwhile
        again = engine.answer(requests(model.config)[2])
        stats = engine.stats()
        assert (stats.free_pages, stats.free_slots, stats.compiled_programs) == (stats.pages, 4, programs)
    return [*tokens, again.tokens], again.usage.cached_tokens


def main(folder, shape, coordinator, processes, process, head=None):
    with joined(coordinator, int(processes), int(process)) as links:
        mesh = make_mesh(shape)
        model = kimi_jax.load(folder, dtype=jnp.float32, mesh=mesh)
        draft = Echo if head is None else load_head(head, model.config, mesh, jnp.float32)
        if not links.first:
            return follow(model, links, draft)
        print("\n" + json.dumps(answers(model, links=links, draft=draft)))


if __name__ == "__main__":
    main(*sys.argv[1:])
