"""What a decode step of K2.5 sends between devices: a few activations a layer, and no weight, state or cache."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import kimi_jax
from kimi_jax import decoding
from sharding import make_mesh

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(?:-start)?\(.*?replica_groups=(?:\{{\{{([\d,]*)|\[\d+,(\d+)\])")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "u32": 4, "pred": 1}
BATCH = 8


def collectives(text):
    """[(kind, bytes of its operands on a device)] of a compiled module."""
    found = []
    for result, kind, group, size in COLLECTIVE.findall(text):
        devices = int(size) if size else len(group.split(","))
        sizes = ((BYTES[dtype], map(int, filter(None, dims.split(",")))) for dtype, dims in SHAPE.findall(result))
        total = sum(width * math.prod(dims) for width, dims in sizes)
        found.append((kind, {"all-gather": total // devices, "reduce-scatter": total * devices}.get(kind, total)))
    return found


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
    sent = collectives(step.compile().as_text())

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
