"""Eagle3 heads of both forms against their float64 reference: one pass, drafts of ragged rows, and caches."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import load, load_head
from checkpoints.toy import write_toy
from kimi_jax.config_json import ConfigError, from_dict
from kimi_jax.looking import look
from kimi_jax.model.context import Context
from kimi_jax.model.kimi import abstract
from kimi_jax.model.param import weight_shardings, weight_specs
from kimi_jax.runtime import cache as caches
from kimi_jax.runtime.batch import pages_in_order
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.program import Program
from sharding import Partition, StreamLayout, make_mesh

ATOL = 2e-4  # of logits of unit scale
OTHER_WAY = 1e-4  # of vectors computed in another way than in one pass
COUNT = 5
TARGET = from_dict(cases.EAGLE_TARGET)
kinds = pytest.mark.parametrize("kind", cases.EAGLE_SEEDS)


def quick(*kinds):
    """Returns the mark of a test that runs for these kinds of heads, and as a slow one for the others."""
    slow = [kind for kind in cases.EAGLE_SEEDS if kind not in kinds]
    return pytest.mark.parametrize("kind", [*kinds, *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow)])


@pytest.fixture(scope="module")
def golden():
    with np.load(cases.HERE / "eagle.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")

    @functools.cache
    def load(kind):
        made = write_toy(folder / kind, cases.eagle_config(kind), seed=cases.EAGLE_SEEDS[kind])
        return load_head(made, TARGET, dtype=jnp.float32)

    return load


@pytest.fixture(scope="module")
def drafter(head, golden):
    """Returns a function from a kind to its drafter, beside a target of which only embeddings are there."""

    @functools.cache
    def make(kind):
        _, _, embeddings = cases.eagle_inputs(kind, int(golden[f"{kind}/draw"]))
        return EagleDrafter(head(kind), target(embeddings))

    return make


def target(embeddings):
    """Returns a target of shapes, of which only the embeddings are there."""
    model = abstract(TARGET)
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weight.replace(jnp.asarray(embeddings))
    return model


def ragged(kind, golden, lengths=cases.EAGLE_LENGTHS):
    """Returns the outputs, tokens and positions of rows that have the first `lengths` of the golden's inputs."""
    aux, tokens, _ = cases.eagle_inputs(kind, int(golden[f"{kind}/draw"]))
    columns = np.arange(len(tokens), dtype=np.int32)
    positions = np.where(columns < np.array(lengths)[:, None], columns, -1)
    return np.tile(aux, (len(lengths), 1, 1)), np.tile(tokens, (len(lengths), 1)), positions


@kinds
def test_the_golden_belongs_to_the_checkpoint_and_decides_clearly(golden, kind):
    assert cases.fingerprint(kind) == golden[f"{kind}/sha256"].item()
    assert golden[f"{kind}/margin"] > cases.MARGIN and 0.5 < golden[f"{kind}/logits"].std() < 1.5


@kinds
def test_logits_and_vectors_of_one_pass(drafter, golden, kind):
    made, (aux, tokens, positions) = drafter(kind), ragged(kind, golden, (40,))

    @jax.jit
    def one_pass(arrays, aux, tokens, positions):
        head = nnx.merge(made.jitted.graph, jax.tree.unflatten(made.jitted.tree, arrays))
        hidden = head.combine(aux, StreamLayout().partition)
        normed, vectors, _ = head(hidden, tokens, Context(positions), None, StreamLayout())
        return head.logits(normed), vectors

    logits, vectors = one_pass(made.arrays, aux, tokens, positions)
    np.testing.assert_allclose(logits[0, cases.EAGLE_POSITIONS], golden[f"{kind}/logits"], rtol=0, atol=ATOL)
    np.testing.assert_allclose(vectors[0, cases.EAGLE_POSITIONS], golden[f"{kind}/vectors"], rtol=0, atol=ATOL)


@kinds
def test_ragged_rows_draft_the_reference_s_tokens(drafter, golden, kind):
    made, inputs = drafter(kind), ragged(kind, golden)
    table = pages_in_order(4, 64)
    _, drafts = made.propose(made.cache(table.size), *inputs, table, COUNT)
    np.testing.assert_array_equal(drafts, golden[f"{kind}/drafts"])
    assert drafts.dtype == jnp.int32


@quick("eagle3-mla")
def test_steps_that_write_over_drafts_compute_what_one_pass_does(drafter, golden, kind):
    """The rows come in pieces, the last of one token, and after each something is drafted that the next replaces."""
    made, (aux, tokens, positions) = drafter(kind), ragged(kind, golden)
    table = pages_in_order(4, 64)[::-1].copy()
    cache, drafts = made.cache(table.size), None
    for start, stop, width in ((0, 16, 20), (16, 17, 20), (17, 37, 20), (37, 39, 20), (39, 40, 1)):
        part = [np.zeros((4, width, *array.shape[2:]), array.dtype) for array in (aux, tokens)]
        where = np.full((4, width), -1, np.int32)
        for array, whole in zip((*part, where), (aux, tokens, positions), strict=True):
            array[:, : stop - start] = whole[:, start:stop]
        cache, found = made.propose(cache, *part, where, table, COUNT)
        here = where.max(axis=1) == positions.max(axis=1)
        drafts = found if drafts is None else np.where(here[:, None], found, drafts)
    np.testing.assert_array_equal(drafts, golden[f"{kind}/drafts"])


@quick("eagle3-mla", "eagle3-llama")
def test_chunks_that_are_taken_in_leave_the_cache_of_one_pass(drafter, golden, kind):
    made, (aux, tokens, positions) = drafter(kind), ragged(kind, golden)
    table = pages_in_order(4, 64)
    whole = made.extend(made.cache(table.size), aux, tokens, positions, table)
    pieces = made.cache(table.size)
    for part in (slice(0, 20), slice(20, 40)):
        pieces = made.extend(pieces, aux[:, part], tokens[:, part], positions[:, part], table)
    np.testing.assert_allclose(pieces.pages, whole.pages, rtol=0, atol=OTHER_WAY)
    for row, length in enumerate(cases.EAGLE_LENGTHS):
        assert np.abs(whole.pages[table[row, 0], :, length:]).max() == 0  # padding is not written


@quick("eagle3.1-mla")
def test_drafts_across_the_end_of_a_page_are_those_without_a_cache(drafter, kind):
    made, random, length = drafter(kind), np.random.RandomState(3), 126
    aux = random.standard_normal((1, length, 192)).astype(np.float32)
    tokens = random.randint(0, 288, (1, length)).astype(np.int32)
    columns, width = np.arange(length + COUNT - 1, dtype=np.int32)[None], [(0, 0), (0, COUNT - 1)]

    @jax.jit
    def whole(arrays, hidden, tokens, positions):
        head = nnx.merge(made.jitted.graph, jax.tree.unflatten(made.jitted.tree, arrays))
        normed, vectors, _ = head(hidden, tokens, Context(positions), None, StreamLayout())
        return head.target_ids(jnp.argmax(head.logits(normed), axis=-1).astype(jnp.int32)), vectors

    graph, tree = made.jitted.graph, made.jitted.tree
    hidden = nnx.merge(graph, jax.tree.unflatten(tree, made.arrays)).combine(jnp.asarray(aux), Partition())
    hidden, padded, expected = np.pad(hidden, [*width, (0, 0)]), np.pad(tokens, width), []
    for last in range(length - 1, length + COUNT - 1):
        words, vectors = whole(made.arrays, hidden, padded, np.where(columns <= last, columns, -1))
        expected.append(int(words[0, last]))
        if last + 1 < columns.size:
            hidden[0, last + 1], padded[0, last + 1] = vectors[0, last], words[0, last]
    table = np.array([[3, 1]])
    _, drafts = made.propose(made.cache(4), aux, tokens, columns[:, :length], table.astype(np.int32), COUNT)
    assert drafts[0].tolist() == expected


def test_one_token_is_drafted_without_a_second_run(drafter, golden):
    made, inputs = drafter("eagle3-mla"), ragged("eagle3-mla", golden)
    table = pages_in_order(4, 64)
    _, drafts = made.propose(made.cache(table.size), *inputs, table, 1)
    np.testing.assert_array_equal(drafts, golden["eagle3-mla/drafts"][:, :1])
    with pytest.raises(ValueError, match="count is 0, expected at least 1"):
        made.propose(made.cache(table.size), *inputs, table, 0)


def test_a_head_beside_another_target_is_refused(head):
    other = abstract(from_dict(cases.config("k2")))
    with pytest.raises(ConfigError, match="draft head: target_hidden_size is 64, but that of its target is 128"):
        EagleDrafter(head("eagle3-mla"), other)


@quick("eagle3-llama")
def test_a_mesh_drafts_what_one_device_does(drafter, head, golden, kind):
    """Two rows of the batch are on each half of the mesh; words, heads and widths are sharded over the rest, and the
    pages of latents too."""
    mesh, sequence = (make_mesh("2x2x2x1"), 1) if kind == "eagle3-llama" else (make_mesh("2x1x2x2"), 2)
    graph, params = nnx.split(head(kind))
    sharded = nnx.merge(graph, jax.device_put(params, weight_shardings(params, mesh)))
    whole = target(np.asarray(cases.eagle_inputs(kind, int(golden[f"{kind}/draw"]))[2]))
    weight = whole.model.embed_tokens.weight
    words = PartitionSpec(Partition(mesh).axis_names("vocab"))
    whole.model.embed_tokens.weight = weight.replace(jax.device_put(weight.get_value(), NamedSharding(mesh, words)))
    made, table = EagleDrafter(sharded, whole), pages_in_order(4, 64, data=2, sequence=sequence)
    _, drafts = made.propose(made.cache(table.size), *ragged(kind, golden), table, COUNT)
    np.testing.assert_array_equal(drafts, golden[f"{kind}/drafts"])
    with pytest.raises(ValueError, match="3 rows do not divide over 2 devices"):
        made.extend(made.cache(table.size), *ragged(kind, golden, (40, 1, 17)), table[:3])


def test_heads_that_a_mesh_does_not_divide_are_refused(head):
    mesh = make_mesh("1x1x8x1")
    graph, params = nnx.split(head("eagle3-llama"))
    at = NamedSharding(mesh, PartitionSpec())
    sharded = nnx.merge(graph, jax.device_put(params, at))
    with pytest.raises(ValueError, match="2 heads of keys and values do not divide over 8 devices"):
        EagleDrafter(sharded, abstract(TARGET))


@pytest.mark.parametrize("shape", [None, pytest.param("1x2x2x2", marks=pytest.mark.slow)])
def test_a_target_gives_out_the_sums_after_its_layers(two_layer_model, two_layer_checkpoint, shape):
    """The target has attention residuals, and takes its prompts in a prefill and a decode step."""
    single, tokens = two_layer_model("k3"), np.random.RandomState(0).randint(0, 500, (2, 33)).astype(np.int32)
    expected = look(single, tokens, what=("hidden",)).hidden
    mesh = None if shape is None else make_mesh(shape)
    model = single if mesh is None else load(two_layer_checkpoint("k3"), mesh, jnp.float32)
    program, partition = Program(model), Partition(mesh)
    table = pages_in_order(2, 64, sequence=program.sequence)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def extend(arrays, cache, tokens, positions, phase, aux_layers):
        graph, params = nnx.split(jax.tree.unflatten(program.jitted.tree, arrays))
        layout = nnx.merge(graph, params).stream_layout(partition, *tokens.shape)

        def on_device(params, layers, tokens, positions, table):
            context = Context(positions, table, phase=phase)
            whole = nnx.merge(graph, params)
            _, layers, aux = whole.extend_with_aux(layers, tokens, context, None, None, layout, aux_layers)
            return layers, aux

        rows, layers = layout.row_spec(), caches.specs(cache, partition).layers
        in_specs = (weight_specs(params, partition), layers, rows, rows, layout.row_spec("row_pages"))
        run = partition.shard_map(on_device, in_specs, (layers, rows))
        layers, aux = run(params, cache.layers, tokens, positions, jnp.asarray(table))
        return caches.Cache(layers), aux

    cache, found = program.cache(table.size, 2), []
    for start, stop, phase in ((0, 32, "prefill"), (32, 33, "decode")):
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, stop - start))
        cache, aux = extend(program.arrays, cache, tokens[:, start:stop], positions, phase, (1, 0))
        found.append(aux)
    aux = np.concatenate([expected[1], expected[0]], axis=-1)
    np.testing.assert_allclose(np.concatenate(found, axis=1), aux, rtol=0, atol=OTHER_WAY)
    assert extend.eval_shape(program.arrays, cache, tokens[:, :1], positions, "decode", ())[1] is None
