"""What a decode step of K2.5 sends between devices: a few activations a layer, and no weight, state or cache."""

import jax
import jax.numpy as jnp
import pytest

import kimi_jax
from kimi_jax import decoding
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.traffic import collectives
from sharding import make_mesh

BATCH = 8


@pytest.mark.parametrize(
    ("shape", "most"), [("1x8x1x1", 2), ("2x4x1x1", 2), ("1x2x4x1", 3), ("2x2x2x1", 3), ("1x1x1x8", 5), ("2x1x2x2", 5)]
)
def test_a_decode_step_sends_a_few_activations_a_layer(checkpoint, shape, most):
    # Given K2.5's three layers, one dense and two mixtures, on a mesh
    mesh = make_mesh(shape)
    model = kimi_jax.load(checkpoint("k2.5"), mesh=mesh, dtype=jnp.float32)
    text = model.config.text
    runner = decoding.Runner(model)

    # When a step is compiled
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    step = decoding._step.lower(runner.program, runner.arrays, runner.state_shapes(BATCH, 1024), tokens)
    messages = collectives(parse(step.compile().as_text()), dict(mesh.shape))
    sent = [(message.kind, message.nbytes) for message in messages for _ in range(message.count)]

    # Then the embeddings take one message and each layer at most so many
    assert len(sent) <= 1 + most * text.num_hidden_layers, sent
    assert len(sent) >= 1 + text.num_hidden_layers
    # And none is larger than the batch's hidden vectors, but the partial softmaxes of the heads of a sequence group
    largest = BATCH * text.hidden_size * 4
    heads = text.num_attention_heads // mesh.shape["tensor"]
    partials = BATCH // mesh.shape["data"] * heads * (text.kv_lora_rank + 2) * 4
    for kind, size in sent:
        assert size <= (partials if kind == "all-to-all" else largest), sent
    assert [kind for kind, _ in sent].count("all-to-all") == (text.num_hidden_layers if most == 5 else 0), sent
