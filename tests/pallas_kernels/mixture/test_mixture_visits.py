"""The lists of a mixture's visits, in plain JAX and of the interpreted kernel, against loops over tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hardware import LANES
from pallas_kernels.mixture import mosaic_visits, visits

# Tokens, choices of each, experts, the first local one, local ones, cores
CASES = (
    (64, 8, 384, 12, 6, 1),
    (5, 3, 12, 4, 5, 2),
    (1, 1, 64, 60, 2, 1),
    (128, 4, 130, 3, 127, 1),
    (37, 2, 12, 0, 12, 2),
)


def choices(tokens, chosen, experts, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(experts)[:chosen] for _ in range(tokens)], np.int32)


def check(chosen, first, num_local, cores, found):
    """Checks what every visit reads out of the lists, an expert after another."""
    chosen, lists, per_core, pairs = np.asarray(chosen), jax.tree.map(np.asarray, found[0]), int(found[1]), chosen.size
    wanted = [
        (expert, [t * chosen.shape[1] + j for t, j in zip(*np.nonzero(chosen == first + expert), strict=True)])
        for expert in range(num_local)
    ]
    wanted = [(expert, numbers) for expert, numbers in wanted if numbers]
    assert per_core == max(1, -(-len(wanted) // cores))
    visited = lists.expert[: per_core * cores].tolist()
    assert visited == ([expert for expert, _ in wanted] + [num_local] * per_core * cores)[: per_core * cores]
    for number, (expert, expected) in enumerate(wanted):
        assert lists.visit[expert] == number
        assert sorted(lists.pair[lists.start[expert] : lists.end[expert]] % pairs) == expected
    assert (lists.end - lists.start)[:num_local].sum() == sum(len(numbers) for _, numbers in wanted)


@pytest.mark.parametrize(("tokens", "chosen", "experts", "first", "num_local", "cores"), CASES)
def test_every_pair_is_visited_once(tokens, chosen, experts, first, num_local, cores):
    given = jnp.asarray(choices(tokens, chosen, experts))
    assert mosaic_visits.serves(tokens, num_local, LANES, cores)
    plain = partial(visits.expert_visits, first=first, num_local=num_local, rows=LANES, cores=cores)
    kernel = partial(mosaic_visits.expert_visits, first=first, num_local=num_local, cores=cores, interpret=True)
    for run in (plain, kernel):
        check(given, first, num_local, cores, jax.jit(run)(given))


def test_experts_that_are_elsewhere_and_no_experts_are_not_visited():
    for first in (0, 3):
        given = jnp.array([[-1, 7], [9, 3], [7, -1]], jnp.int32)
        check(given, first, 2, 1, mosaic_visits.expert_visits(given, first, 2, 1, interpret=True))


def test_what_fits_no_visit_or_no_register_is_left_to_plain_jax():
    assert mosaic_visits.serves(128, 126, 128, 2)
    assert not any(mosaic_visits.serves(*case) for case in ((129, 6, 256, 1), (64, 6, 48, 1), (64, 127, 64, 2)))


def test_reads_nothing_that_is_out_of_bounds_and_uses_nothing_uninitialised():
    careful = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    given = jnp.asarray(choices(5, 2, 9))
    try:
        found = jax.device_get(mosaic_visits.expert_visits(given, 2, 4, 1, interpret=careful))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    check(given, 2, 4, 1, found)
