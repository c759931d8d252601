"""What a decode step sends between devices: the sums of the experts' results, and no weight or state."""

import math
import re

import jax.numpy as jnp
import pytest

import kimi_jax
from kimi_jax import decoding
from sharding import make_mesh

COLLECTIVE = re.compile(
    r" = (\S+?)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)
BATCH = 4


@pytest.mark.parametrize("shape", ["2x4", "1x8"])
@pytest.mark.parametrize("name", ["k2.5", "kimi-linear"])
def test_a_decode_step_sends_one_activation_per_mixture(checkpoint, name, shape):
    # Given a model on a mesh, and rows with a state
    model = kimi_jax.load(checkpoint(name), mesh=make_mesh(shape), dtype=jnp.float32)
    text = model.config.text
    runner = decoding.Runner(model)

    # When a step is compiled
    step = decoding._step.lower(runner.program, runner.arrays, runner.start(BATCH, 256), jnp.zeros(BATCH, jnp.int32))
    sent = COLLECTIVE.findall(step.compile().as_text())

    # Then its collectives are one sum per mixture, of a row's hidden vector at most
    mixtures = sum(text.is_moe(i) for i in range(text.num_hidden_layers))
    assert [what for _, _, what in sent].count("all-reduce") == mixtures, sent
    for dtype, size, _ in sent:
        assert dtype in ("f32", "s32"), sent
        assert math.prod(int(n) for n in size.split(",") if n) <= BATCH * text.hidden_size, sent
