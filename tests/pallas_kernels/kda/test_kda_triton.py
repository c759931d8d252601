"""KDA's kernels for GPUs, interpreted, against the float64 recurrence of each segment."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kda_tokens import packed_ids, rounded, rows_of_decays, segments_as_rows, states
from kernel_numerics import relative_rmse

from pallas_kernels import kda
from pallas_kernels.kda import reference

DECAYS = (60, (0.01, 0.1, 2, 20, 60))
RUN = jax.jit(partial(kda, num_segments=4, implementation="triton"))


@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [(jnp.float32, (1e-5, 1e-5)), pytest.param(jnp.bfloat16, (5e-3, 1e-2), marks=pytest.mark.slow)],
)
def test_packed_segments_of_every_length_and_decay(dtype, tolerances):
    # Given segments of one token, of a chunk less one and one more, an empty one, and NaN where there is padding
    ids, initial = packed_ids((1, 63, 0, 65)), states(len(DECAYS), 4, 2)
    arrays = rows_of_decays(len(ids), DECAYS)
    for array in arrays:
        array[:, ids < 0] = np.nan
    inputs = rounded(arrays, dtype)
    rows = segments_as_rows(inputs, ids, 4, len(ids))
    with jax.enable_x64(True):
        wide = (
            jnp.asarray(np.asarray(array, np.float64)) for array in (*rows, np.concatenate([*initial.swapaxes(0, 1)]))
        )
        expected_o, expected = map(np.asarray, jax.jit(reference.kda)(*wide))

    packed = jnp.asarray(np.tile(ids, (len(DECAYS), 1)))
    o, after = RUN(*inputs, initial_state=jnp.asarray(initial), segment_ids=packed)

    assert o.dtype == dtype and not np.asarray(o, np.float32)[:, ids < 0].any()
    np.testing.assert_array_equal(after[:, 2], initial[:, 2])
    for n, row in np.ndindex(4, len(DECAYS)):
        at, own = n * len(DECAYS) + row, ids == n
        for head, tolerance in enumerate(tolerances):
            assert relative_rmse(after[row, n, head], expected[at, head]) <= tolerance
            if own.any():
                found = np.asarray(o[row, own, head], np.float64)
                assert relative_rmse(found, expected_o[at, : own.sum(), head]) <= tolerance


def test_says_why_it_cannot():
    arrays = (jnp.zeros((1, 20, 1, 48)),) * 4
    with pytest.raises(ValueError, match="Dk and Dv are 48 and 48, expected powers of two from 16 and 32"):
        kda(*arrays, jnp.zeros((1, 20, 1)), implementation="triton")
