"""Eagle3 heads of both forms against their float64 reference: one pass, drafts of ragged rows, and caches."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints import load_head
from checkpoints.toy import write_toy
from kimi_jax.config_json import ConfigError, from_dict
from kimi_jax.model.context import Context
from kimi_jax.model.kimi import abstract
from kimi_jax.runtime.batch import pages_in_order
from kimi_jax.runtime.eagle import EagleDrafter
from sharding import StreamLayout

ATOL = 2e-4  # of logits of unit scale
OTHER_WAY = 1e-4  # of vectors computed in another way than in one pass
COUNT = 5
TARGET = from_dict(cases.EAGLE_TARGET)
kinds = pytest.mark.parametrize("kind", cases.EAGLE_SEEDS)


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


@kinds
def test_steps_that_write_over_drafts_compute_what_one_pass_does(drafter, golden, kind):
    """The rows come in three pieces, and after each but the last something is drafted that the next one replaces."""
    made, (aux, tokens, positions) = drafter(kind), ragged(kind, golden)
    table = pages_in_order(4, 64)[::-1].copy()
    cache, drafts = made.cache(table.size), None
    for start, stop in ((0, 16), (16, 32), (32, 48)):
        part = [np.zeros((4, 16, *array.shape[2:]), array.dtype) for array in (aux, tokens)]
        where = np.full((4, 16), -1, np.int32)
        for array, whole in zip((*part, where), (aux, tokens, positions), strict=True):
            array[:, : min(stop, 40) - start] = whole[:, start:stop]
        cache, found = made.propose(cache, *part, where, table, COUNT)
        here = where.max(axis=1) == positions.max(axis=1)
        drafts = found if drafts is None else np.where(here[:, None], found, drafts)
    np.testing.assert_array_equal(drafts, golden[f"{kind}/drafts"])


@kinds
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
