"""Batches of any rows for tests that compare logits: greedy, without an end."""

import numpy as np

from kimi_jax.runtime.batch import Batch, padded_stop_ids
from kimi_jax.runtime.sampling import Sampling, checked_seeds, sampling_rows


def greedy_batch(tokens, positions, table, slots, **more):
    """Returns a batch that chooses greedily and never stops, of a model of 768 words."""
    count = len(table)
    return Batch(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(table, np.int32),
        sampling_rows([Sampling()] * count, checked_seeds(0, count)),
        padded_stop_ids((), count, 768),
        np.full(count, 1000, np.int32),
        np.ones(count, bool),
        slots=None if slots is None else np.asarray(slots, np.int32),
        **more,
    )
