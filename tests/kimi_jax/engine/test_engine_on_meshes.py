"""The engine on eight devices answers as one device does: pages, slots and snapshots of each data shard, pages in turn
over `sequence`, several prompts in a row."""

import asyncio

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import kimi_jax
from sharding import make_mesh

LENGTHS = (5, 150, 300, 400, 131, 128, 129, 256, 1, 40, 30)
NEW = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder for checkpoints of two layers."""
    return tmp_path_factory.mktemp("meshes")


# Each compiles eight programs for eight devices.
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x2x4x1", "2x2x2x1", "2x2x1x2"])
@pytest.mark.parametrize("name", ["k2.5", "kimi-linear"])
def test_random_requests_on_a_mesh(folder, two_layer_model, name, shape):
    random = np.random.RandomState(1)
    prompts = [random.randint(0, 500, length).astype(np.int32) for length in LENGTHS]
    tokens = np.zeros((len(prompts), max(LENGTHS)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    expected = kimi_jax.generate(two_layer_model(name), tokens, NEW, lengths=np.array(LENGTHS), stop_ids=())
    checkpoint = folder / name
    if not checkpoint.exists():
        cases.two_layers(name, folder)
    model = kimi_jax.load(checkpoint, dtype=jnp.float32, mesh=make_mesh(shape))

    async def read(engine, prompt):
        request = kimi_jax.Request(prompt, max_new_tokens=NEW, stop_ids=())
        return [token async for event in engine.submit(request) for token in event.tokens]

    async def everybody(engine):
        return await asyncio.gather(*(read(engine, prompt) for prompt in prompts))

    with kimi_jax.Engine(model, slots=4, cache_memory="1MiB", prefill_chunk=64) as engine:
        programs = engine.stats().compiled_programs
        assert asyncio.run(everybody(engine)) == expected.tolist()
        again = engine.answer(kimi_jax.Request(prompts[3], max_new_tokens=NEW, stop_ids=()))
        stats = engine.stats()
    assert again.tokens == expected[3].tolist() and again.usage.cached_tokens == 384
    assert (stats.free_pages, stats.free_slots, stats.compiled_programs) == (stats.pages, 4, programs)
