"""The same sequences in any batch: other rows beside them, other pages and slots, shared pages, packed in one row."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from greedy_batch import greedy_batch as batch

import kimi_jax
from kimi_jax.model.context import PAGE
from kimi_jax.plan.hlo import parse
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.program import Program
from sharding import make_mesh

ATOL = 1e-6  # of float32 logits of unit scale, in batches of one shape
OTHER_SHAPE_ATOL = 1e-5  # a product of another shape adds up in another order
LENGTHS = (150, 5, 131)
MESH_ATOL = 5e-5  # the tolerance of test_meshes.py
PAGES, SLOTS = 9, 6
NAMES = ["k2.5", "kimi-linear"]
RANDOM = np.random.RandomState(0)
SEQUENCES = [RANDOM.randint(0, 500, length + 1).astype(np.int32) for length in LENGTHS]
PLAIN_TABLE = np.array([[0, 1], [2, 3], [4, 5]], np.int32)


def prefill(sequences, table, slots, begin=0, width=160):
    """Returns the step that takes all but the last token of each sequence, from `begin` on."""
    tokens, positions = np.zeros((len(sequences), width)), np.full((len(sequences), width), -1)
    for row, sequence in enumerate(sequences):
        here = sequence[begin:-1]
        tokens[row, : len(here)], positions[row, : len(here)] = here, begin + np.arange(len(here))
    return batch(tokens, positions, table, slots)


def decode(sequences, table, slots):
    """Returns the step that takes the last token of each sequence."""
    tokens = [[sequence[-1]] for sequence in sequences]
    return batch(tokens, [[len(sequence) - 1] for sequence in sequences], table, slots, phase="decode")


def run(program, *batches, cache=None):
    """Runs the steps, and returns the cache and the logits of each step."""
    cache = program.cache(PAGES, SLOTS) if cache is None else cache
    found = []
    for step in batches:
        cache, logits = program.logits(cache, step)
        found.append(np.asarray(logits))
    return cache, found


@pytest.fixture(scope="module")
def plain(model):
    """Returns a function from a name to the program and the logits of prefill and decode in the plain case, with pages
    and slots in order."""
    known = {}

    def of(name):
        if name not in known:
            program = Program(model(name))
            steps = [make(SEQUENCES, PLAIN_TABLE, [0, 1, 2]) for make in (prefill, decode)]
            known[name] = program, run(program, *steps)[1]
        return known[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_pages_slots_and_neighbours_change_no_logits(plain, name):
    program, expected = plain(name)
    compiled = program.compiled
    # Given pages scattered over a used pool, slots permuted, and the rows in another order
    table, slots, order = np.array([[8, 1], [5, 7], [0, 6]]), [4, 0, 3], [2, 0, 1]
    cache, _ = run(program, prefill([sequence[::-1] for sequence in SEQUENCES], PLAIN_TABLE, [4, 0, 3]))
    turned = [SEQUENCES[i] for i in order]
    _, found = run(program, prefill(turned, table, slots), decode(turned, table, slots), cache=cache)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want[order], rtol=0, atol=ATOL)
    # Given one sequence beside others, one of which is padding
    mixture = [SEQUENCES[1][::-1], SEQUENCES[0], np.zeros(1, np.int32)]
    steps = [make(mixture, table, [4, 0, -1]) for make in (prefill, decode)]
    steps[1].positions[2] = -1
    for got, want in zip(run(program, *steps)[1], expected, strict=True):
        np.testing.assert_allclose(got[1], want[0], rtol=0, atol=ATOL)
    assert program.compiled == compiled


def test_no_product_of_a_history_runs_before_it_is_known_that_there_is_one(plain):
    # Given a table of one piece, whose keys and values depend on no turn of the loop over pieces
    program, _ = plain("k2.5")
    cache, step = program.cache(PAGES, SLOTS), prefill(SEQUENCES, PLAIN_TABLE, [0, 1, 2])
    made = program.jitted.logits.lower(program.arrays, cache, step).compile()  # it is compiled already
    hlo = parse(made.as_text())

    def of_loops(instructions):
        texts = [instruction.attributes for instruction in instructions.values()]
        return [text for text in texts if "while/body" in text and "dot_general" in text]

    # Then what the program begins with has no product of a loop, and other computations have some
    assert not of_loops(hlo.computations[hlo.entry])
    assert any(map(of_loops, hlo.computations.values()))


@pytest.mark.parametrize("name", [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def test_a_row_alone(plain, name):
    program, expected = plain(name)
    steps = [make(SEQUENCES[:1], [[3, 1]], [5]) for make in (prefill, decode)]
    for got, want in zip(run(program, *steps)[1], expected, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=OTHER_SHAPE_ATOL)


def test_slots_in_order(plain):
    # Without slots row i has slot i; K2.5 has nothing in slots
    program, expected = plain("kimi-linear")
    steps = [make(SEQUENCES, PLAIN_TABLE, None) for make in (prefill, decode)]
    for got, want in zip(run(program, *steps, cache=program.cache(PAGES, 3))[1], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=OTHER_SHAPE_ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_that_sequences_share(plain, name):
    program, _ = plain(name)
    prefix = np.append(SEQUENCES[0][:PAGE], 0)
    whole = [np.concatenate([prefix[:-1], SEQUENCES[2][begin : begin + 23]]) for begin in (0, 50, 100)]

    def rest(table):
        return prefill(whole, table, [0, 1, 2], begin=PAGE), decode(whole, table, [0, 1, 2])

    _, (_, *expected) = run(program, prefill([prefix] * 3, PLAIN_TABLE, [0, 1, 2]), *rest(PLAIN_TABLE))
    # Given its page computed once, by a row of its own, and its states copied
    nobody = np.zeros(1, np.int32)
    cache, _ = run(program, prefill([prefix, nobody, nobody], [[8, 7]] * 3, [5, -1, -1]))
    cache = program.copy_slots(cache, np.full(3, 5, np.int32), np.arange(3, dtype=np.int32))
    # Then three rows that name the page and continue have the logits of three that computed it themselves
    _, found = run(program, *rest([[8, 0], [8, 1], [8, 2]]), cache=cache)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_decode_steps_packed_in_one_row(plain, name):
    program, expected = plain(name)
    # Given the first prompt's first 140 tokens, then in one row its last ones, both others whole, and padding
    table, slots = [[3, 8], [0, 1], [7, 4]], [2, 5, 0]
    pieces = [(0, 140, 150), (1, 0, 5), (2, 0, 131)]
    cache, _ = run(program, prefill([SEQUENCES[0][:141]], table[:1], slots[:1]))
    tokens, positions, segments = np.zeros((1, 160)), np.full((1, 160), -1), np.full((1, 160), -1)

    def pack(pieces):
        at = 0
        tokens[:], positions[:], segments[:] = 0, -1, -1
        for i, begin, end in pieces:
            here = slice(at, at := at + end - begin)
            tokens[0, here], positions[0, here], segments[0, here] = SEQUENCES[i][begin:end], range(begin, end), i
        return batch(tokens, positions, table, slots, segments=segments.astype(np.int32))

    cache, (prompt,) = run(program, pack(pieces), cache=cache)
    np.testing.assert_allclose(prompt, expected[0], rtol=0, atol=OTHER_SHAPE_ATOL)
    # Then one more token of the last two packed, and of the first by a decode step
    cache, (packed,) = run(program, pack([(1, 5, 6), (2, 131, 132)]), cache=cache)
    np.testing.assert_allclose(packed[1:], expected[1][1:], rtol=0, atol=OTHER_SHAPE_ATOL)
    _, (decoded,) = run(program, decode(SEQUENCES[:1], table[:1], slots[:1]), cache=cache)
    np.testing.assert_allclose(decoded[0], expected[1][0], rtol=0, atol=OTHER_SHAPE_ATOL)


def test_ends_stops_masks_and_those_who_are_finished(plain):
    program, (logits, _) = plain("k2.5")
    best = logits.argmax(-1)
    step = prefill(SEQUENCES, PLAIN_TABLE, [0, 1, 2])
    # Given a row that may have one more token, one whose token is a stop id, and one that may choose token 70 only
    all_words = np.full((3, 24), 2**32 - 1, np.uint32)
    step = dataclasses.replace(step, ends=np.array([151, 1000, 1000], np.int32), mask=all_words)
    step.stop_ids[1, 3] = best[1]
    step.mask[2], step.mask[2, 2] = 0, 1 << 6
    cache, chosen = program.step(program.cache(PAGES, SLOTS), step)
    assert chosen.tokens.tolist() == [best[0], best[1], 70]
    assert chosen.finish.tolist() == [Finish.LENGTH, Finish.STOP, Finish.NOT_YET]
    # Then only the last row continues, and the caches of the others do not change
    before = np.asarray(cache.layers[0].pages)
    positions = np.array(LENGTHS, np.int32)
    cache, after = program.step(cache, dataclasses.replace(step, mask=None).next_token(positions, chosen))
    assert after.tokens.tolist()[:2] == best[:2].tolist()
    assert after.finish.tolist() == [Finish.LENGTH, Finish.STOP, Finish.NOT_YET]
    changed = (np.asarray(cache.layers[0].pages) != before).any(axis=1)
    assert np.argwhere(changed).tolist() == [[5, 131 - PAGE]]


def test_batches_that_make_no_sense_are_refused(plain):
    program, _ = plain("k2.5")
    step = prefill(SEQUENCES, PLAIN_TABLE, [0, 1, 2])
    with pytest.raises(ValueError, match="a decode step has rows of 160 tokens, expected one token and no segments"):
        program.step(program.cache(PAGES, SLOTS), dataclasses.replace(step, phase="decode"))


# Kimi Linear has both kinds of mixers; K2.5 has its pages on a mesh in test_meshes.py, and packed rows above
@pytest.mark.parametrize("name", [pytest.param("k2.5", marks=pytest.mark.slow), "kimi-linear"])
def test_pages_slots_and_packed_rows_on_a_mesh(checkpoint, plain, name):
    # Given two parts of the batch, each with pages and slots of its own, and each sequence's pages over two devices
    _, expected = plain(name)
    program = Program(kimi_jax.load(checkpoint(name), dtype=jnp.float32, mesh=make_mesh("2x1x2x2")))
    sequences, order = [SEQUENCES[i] for i in (2, 0, 1, 0)], [2, 0, 1, 0]
    table, slots = np.array([[1, 2], [0, 0], [2, 1], [1, 0]]), [2, 0, 1, 2]
    steps = [make(sequences, table, slots) for make in (prefill, decode)]
    cache, found = run(program, *steps, cache=program.cache(12, 6))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want[order], rtol=0, atol=MESH_ATOL)
    # Then the sequences of each part, packed in one row over used pages, have the same logits
    tokens, positions, segments = np.zeros((2, 320)), np.full((2, 320), -1), np.full((2, 320), -1, np.int32)
    for row, (first, second) in enumerate([(0, 1), (2, 3)]):
        joined = [sequences[first][:-1], sequences[second][:-1]]
        length = sum(map(len, joined))
        tokens[row, :length] = np.concatenate(joined)
        positions[row, :length] = np.concatenate([np.arange(len(part)) for part in joined])
        segments[row, :length] = np.repeat([0, 1], [len(part) for part in joined])
    packed = batch(tokens, positions, table[::-1], [0, 2, 2, 0], segments=segments)
    _, (got,) = run(program, packed, cache=cache)
    np.testing.assert_allclose(got, expected[0][order], rtol=0, atol=MESH_ATOL)
