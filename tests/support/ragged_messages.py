"""`jax.lax.ragged_all_to_all` from other messages, after its documentation: XLA has none for CPU."""

import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Rows [input_offsets[r], + send_sizes[r]) of each device's operand lie in device r's output from that device's
    output_offsets[r] on. A row with another count than `recv_sizes` says is written over with NaN."""
    me = lax.axis_index(axis_name)
    operands = lax.all_gather(operand, axis_name)
    begins, counts, places = (lax.all_gather(x, axis_name)[:, me] for x in (input_offsets, send_sizes, output_offsets))
    row = jnp.arange(max(len(operand), len(output)))
    for sender in range(len(counts)):
        sent = row < counts[sender]
        rows = operands[sender].at[jnp.where(sent, begins[sender] + row, 0)].get(mode="fill", fill_value=jnp.nan)
        output = output.at[jnp.where(sent, places[sender] + row, len(output))].set(rows, mode="drop")
    return jnp.where((counts == recv_sizes).all(), output, jnp.nan)
