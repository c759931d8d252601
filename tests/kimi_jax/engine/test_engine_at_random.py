"""Sixty-four random requests on one device and on meshes, in a pool of two fifths of the pages that they need, have the
tokens that each has alone."""

import asyncio
import dataclasses
import functools
import time

import cases
import jax.numpy as jnp
import numpy as np
import pytest
from idle_engine import forget_all

import kimi_jax
from kimi_jax.engine import engine as engine_module
from kimi_jax.model.context import PAGE
from sharding import make_mesh

COUNT, LONGEST, SHARE = 64, 3000, 0.4
LENGTH = LONGEST + 256  # with the answer


def random_requests(config):
    """Returns requests of 1 to 3,000 tokens, as many short as long ones; a third begin as another does. With vision, a
    quarter have one of three pictures of one size."""
    random, grid = np.random.RandomState(6), np.array([1, 4, 4], np.int32)
    lengths = [1, LONGEST, *np.exp(random.uniform(0, np.log(LONGEST), COUNT - 2)).astype(int)]
    requests = []
    for number, length in enumerate(lengths):
        tokens, media = random.randint(0, 500, length).astype(np.int32), None
        if requests and random.rand() < 1 / 3:
            other = np.asarray(requests[random.randint(number)].tokens)
            shared = random.randint(min(len(other), length) + 1)
            tokens[:shared] = np.where(other[:shared] < 500, other[:shared], 7)
        if config.vision is not None and random.rand() < 1 / 4 and length > 8:
            place = random.randint(length - 4)
            tokens[place : place + 4] = config.media_placeholder_token_id
            media = kimi_jax.Media(cases.media(grid) * random.choice([1.0, -1.0, 0.5]), grid[None])
        new, priority = int(random.choice([1, 8, 30, 140])), int(random.randint(3))
        requests.append(kimi_jax.Request(tokens, max_new_tokens=new, stop_ids=(), media=media, priority=priority))
    return requests


async def ask_all(engine, requests):
    """Sends the requests a few at a time, gives up every fifth early, and returns the tokens of the others."""
    random, answers = np.random.RandomState(7), []

    async def read(request):
        return [token async for event in engine.submit(request) for token in event.tokens]

    async def give_up(request):
        stream = engine.submit(request)
        await asyncio.sleep(random.uniform(0, 0.5))
        await stream.aclose()

    for number, request in enumerate(requests):
        answers.append(asyncio.create_task(give_up(request) if number % 5 == 4 else read(request)))
        await asyncio.sleep(random.choice([0.0, 0.0, 0.05]))
    return await asyncio.gather(*answers)


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory):
    """Maps a name to its checkpoint's folder, the requests, and the tokens that each has alone on one device."""
    folder = tmp_path_factory.mktemp("random")

    @functools.cache
    def of(name):
        model = kimi_jax.load(cases.two_layers(name, folder), dtype=jnp.float32)
        requests, tokens = random_requests(model.config), []
        with kimi_jax.Engine(model, slots=1, cache_memory="64MiB", prefill_chunk=256, max_length=LENGTH) as one:
            for request in requests:
                forget_all(one)
                tokens.append(one.answer(request).tokens)
        return folder / name, requests, tokens

    return of


# Each compiles about ten programs, and takes in 30,000 tokens.
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x1x1x1", "1x2x4x1", "2x2x2x1"])
@pytest.mark.parametrize("name", ["k2.5", "kimi-linear"])
def test_64_random_requests_have_the_tokens_of_single_runs(single_runs, monkeypatch, name, shape):
    checkpoint, requests, expected = single_runs(name)
    needed = sum(-(-(len(request.tokens) + request.max_new_tokens) // PAGE) for request in requests)
    sizes_of = engine_module.pool_sizes

    def few_pages(*arguments):
        sizes = sizes_of(*arguments)
        return dataclasses.replace(sizes, pages=int(needed * SHARE) // 2 * 2)  # (a data axis may have two shards)

    monkeypatch.setattr(engine_module, "pool_sizes", few_pages)
    mesh = None if shape == "1x1x1x1" else make_mesh(shape)
    model = kimi_jax.load(checkpoint, dtype=jnp.float32, mesh=mesh)
    with kimi_jax.Engine(model, slots=32, prefill_chunk=256, max_length=LENGTH) as engine:
        programs = engine.stats().compiled_programs
        answers = asyncio.run(ask_all(engine, requests))
        while (stats := engine.stats()).running or stats.waiting:
            time.sleep(0.1)
    for number, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        assert answer is None or answer == tokens, number
    assert stats.compiled_programs == programs
    assert (stats.free_pages, stats.free_slots) == (stats.pages, 32)
