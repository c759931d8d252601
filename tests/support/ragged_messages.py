"""Emulates `jax.lax.ragged_all_to_all` with other collectives, by its documentation: XLA has none for CPU."""

import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Sends rows [input_offsets[r], + send_sizes[r]) of each device's operand to device r, whose output has them from
    that device's output_offsets[r] on. Overwrites rows with NaN where their count is not that of `recv_sizes`."""
    me = lax.axis_index(axis_name)
    operands = lax.all_gather(operand, axis_name)
    begins, counts, places = (lax.all_gather(x, axis_name)[:, me] for x in (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(max(len(operand), len(output)))
    for sender in range(len(counts)):
        sent = row < counts[sender]
        rows = operands[sender].at[jnp.where(sent, begins[sender] + row, 0)].get(mode="fill", fill_value=jnp.nan)
        output = output.at[jnp.where(sent, places[sender] + row, len(output))].set(rows, mode="drop")
    return jnp.where((counts == recv_sizes).all(), output, jnp.nan)
