"""Models on meshes compute the logits of one device, however heads, experts, tokens and the cache are sharded. A
decode step sends a few activations a layer between devices, and no weight, state or cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_rows import WholeRows

import kimi_jax
from kimi_jax.model.mla import MLA
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.traffic import collectives
from sharding import make_mesh

ATOL = 5e-5  # of logits of unit scale, five times the reference's own float32 error
BATCH, TOKENS, CHUNK = 8, 144, 128
# data x expert x tensor x sequence, and the messages that a layer of K2.5 may send in a decode step
MESHES = [("1x8x1x1", 2), ("2x4x1x1", 2), ("1x2x4x1", 3), ("2x2x2x1", 3), ("1x1x1x8", 5), ("1x2x2x2", 5)]
NAMES = ["k2.5", "kimi-linear", "k3"]
# Each two axes but data and sequence are together in a quick mesh of one model, and those, the sequence of Kimi Linear
# and the data of K2.5 in those of odd numbers and of test_program.py.
QUICK = {"k2.5": ("1x2x2x2",), "kimi-linear": ("2x2x2x1",), "k3": ()}
CASES = [
    pytest.param(name, shape, most, marks=[] if shape in QUICK[name] else [pytest.mark.slow])
    for name in NAMES
    for shape, most in MESHES
]


@pytest.fixture(scope="module")
def prompts():
    """Returns prompts that end in the first and second page of the cache, at the ends of pages and at first tokens."""
    random = np.random.RandomState(0)
    lengths = np.array([144, 1, 129, 33, 130, 127, 128, 5], np.int32)
    return random.randint(0, 500, (BATCH, TOKENS)).astype(np.int32), lengths


def prefill_and_step(rows, tokens, lengths):
    """Returns the logits after the prompts, which take two calls, and after one more token."""
    return np.stack([rows.prefill(tokens, lengths, CHUNK), rows.step(tokens[:, 0])])


@pytest.fixture(scope="module")
def single_device(two_layer_model, prompts):
    """Returns a function from a name to the logits on one device; test_goldens.py compares those of the whole model
    with the reference."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = prefill_and_step(WholeRows(two_layer_model(name), BATCH, 300), *prompts)
        return found[name]

    return of


def check_messages(rows, most):
    """Checks that a step sends one message for the embeddings and at most `most` a layer, of activations only.

    Latent experts' sums travel beside the shared experts', as one message.
    """
    program = rows.program
    text, mesh = program.config.text, program.mesh
    step = program.jitted.logits.lower(program.arrays, rows.cache, rows.next_batch(np.zeros(BATCH)))
    hlo = step.compile().as_text()  # the step is compiled already
    messages = collectives(parse(hlo), dict(mesh.shape))
    sent = [(message.kind, message.nbytes) for message in messages for _ in range(message.count)]
    assert 1 + text.num_hidden_layers <= len(sent) <= 1 + most * text.num_hidden_layers, sent
    # No message is larger than the batch's hidden vectors, except the partial softmaxes of the heads of a sequence
    # group and, in this narrow model, the queries of a device's heads
    part, heads = BATCH // mesh.shape["data"], text.num_attention_heads // mesh.shape["tensor"]
    hidden = BATCH * text.hidden_size * 4
    queries = part * heads // mesh.shape["sequence"] * (text.kv_lora_rank + text.qk_rope_head_dim) * 4
    sums = hidden if text.routed_expert_hidden_size is None else hidden + BATCH * text.expert_width * 4
    partials = part * heads * (text.kv_lora_rank + 2) * 4
    largest = {"all-reduce": sums, "all-to-all": partials, "all-gather": max(hidden, queries)}
    for kind, size in sent:
        assert size <= largest.get(kind, hidden), sent
    attending = text.layer_kinds.count("mla") if most == 5 else 0
    assert [kind for kind, _ in sent].count("all-to-all") == attending, sent


@pytest.mark.parametrize(("name", "shape", "most"), CASES)
def test_prefill_and_decoding_on_a_mesh(two_layer_checkpoint, single_device, prompts, name, shape, most):
    mesh = make_mesh(shape)
    model = kimi_jax.load(two_layer_checkpoint(name), mesh=mesh, dtype=jnp.float32)
    rows = WholeRows(model, BATCH, 300)
    np.testing.assert_allclose(prefill_and_step(rows, *prompts), single_device(name), rtol=0, atol=ATOL)
    if name != "kimi-linear":
        check_messages(rows, most)
    # And each device has its share: an eighth of the experts, its heads' part of the attention, its words
    attention = next(layer.self_attn for layer in model.model.layers if isinstance(layer.self_attn, MLA))
    down = model.model.layers[1].mlp.experts.down_proj
    of_heads = mesh.shape["tensor"] * mesh.shape["sequence"]
    for variable, axis, parts in (
        (down.weight if name == "kimi-linear" else down.codes, 0, 8),
        (attention.o_proj.weight, 1, of_heads),
        (attention.kv_b_proj.weight, 0, of_heads),
        (attention.kv_a_proj_with_mqa.weight, 0, of_heads),
        (model.lm_head.weight, 0, of_heads * mesh.shape["expert"]),
    ):
        assert variable[...].addressable_shards[0].data.shape[axis] == variable.shape[axis] // parts
    cache = next(layer.pages for layer in rows.cache.layers if hasattr(layer, "pages"))
    assert cache.addressable_shards[0].data.nbytes * mesh.shape["data"] * mesh.shape["sequence"] == cache.nbytes


def test_a_whole_pass_and_odd_numbers_on_a_mesh(two_layer_checkpoint, two_layer_model):
    # Given three rows of 31 tokens (two divides neither number), continued by two tokens
    tokens = jnp.asarray(np.random.RandomState(1).randint(0, 500, (3, 31)), jnp.int32)
    plain, folder = two_layer_model("kimi-linear"), two_layer_checkpoint("kimi-linear")
    meshed = kimi_jax.load(folder, mesh=make_mesh("2x1x2x2"), dtype=jnp.float32)
    new = kimi_jax.generate(meshed, np.asarray(tokens), max_new_tokens=2, stop_ids=())
    longer = jnp.concatenate([tokens, new[:, :1]], axis=1)
    single_device = np.asarray(plain(longer))
    # Then a whole pass has the logits of one device, and so has one with two rows of 32, which are sharded
    np.testing.assert_allclose(meshed(tokens), single_device[:, :31], rtol=0, atol=ATOL)
    np.testing.assert_allclose(meshed(longer[:2]), single_device[:2], rtol=0, atol=ATOL)
    # And the new tokens are those of one device
    np.testing.assert_array_equal(new, single_device[:, 30:].argmax(-1))


def test_a_batch_that_cannot_be_sharded(two_layer_checkpoint):
    rows = WholeRows(kimi_jax.load(two_layer_checkpoint("k2.5"), mesh=make_mesh("4x2"), dtype=jnp.float32), 8, 100)
    batch = next(rows.batches(np.ones((6, 2)), np.full(6, 2)))
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be sharded over a data axis of 4"):
        rows.program.step(rows.cache, batch)


@pytest.mark.slow
def test_one_device_as_a_mesh(two_layer_checkpoint, two_layer_model):
    mesh = make_mesh("1x1", devices=jax.devices()[:1])
    plain, meshed = two_layer_model("k2.5"), kimi_jax.load(two_layer_checkpoint("k2.5"), mesh=mesh, dtype=jnp.float32)
    tokens = np.random.RandomState(2).randint(0, 500, (2, 9))
    np.testing.assert_array_equal(
        kimi_jax.generate(meshed, tokens, max_new_tokens=2, stop_ids=()),
        kimi_jax.generate(plain, tokens, max_new_tokens=2, stop_ids=()),
    )
