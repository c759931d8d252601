"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): a gated delta rule with one decay per key channel.

This module is the layer around the recurrence: projections, short convolutions, gates and the gated output norm.
The recurrence itself is `pallas_kernels.kda` (many tokens) and `kda_step` (one).
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from kimi_jax.axes import Float32, Hidden, Int32, Positions, Valid
from kimi_jax.config import TextConfig
from kimi_jax.model.context import KDADraft, KDAState, Phase
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, Linear
from pallas_kernels import kda, kda_step
from sharding import scan_shards, select_last, shift_right


class ShortConv(nnx.Module):
    """Taps of a causal depthwise convolution, [channels, 1, taps] as published; the last meets the current token."""

    def __init__(self, init: Init, channels: int, taps: int):
        self.weight = init.normal((channels, 1, taps), ("kda_heads", None, None))


class KDA(nnx.Module):
    """The token mixer of one layer."""

    def __init__(self, init: Init, config: TextConfig):
        linear = config.linear_attn
        assert linear is not None
        self.heads, self.head_dim, self.lower_bound = linear.num_heads, linear.head_dim, linear.gate_lower_bound
        width, hidden, taps = linear.num_heads * linear.head_dim, config.hidden_size, linear.short_conv_kernel_size
        self.q_proj = Linear(init, width, hidden, ("kda_heads", "embed"))
        self.k_proj = Linear(init, width, hidden, ("kda_heads", "embed"))
        self.v_proj = Linear(init, width, hidden, ("kda_heads", "embed"))
        wide = init.in_float32() if linear.float32_weights else init
        self.q_conv1d = ShortConv(wide, width, taps)
        self.k_conv1d = ShortConv(wide, width, taps)
        self.v_conv1d = ShortConv(wide, width, taps)
        self.A_log = init.param(self.initial_decay(init), ("kda_heads",))
        self.dt_bias = init.param(self.initial_dt_bias(init), ("kda_heads",))
        self.f_a_proj = Linear(init, linear.head_dim, hidden, (None, "embed"))
        self.f_b_proj = Linear(init, width, linear.head_dim, ("kda_heads", "rank"))
        self.b_proj = Linear(init, linear.num_heads, hidden, ("kda_heads", "embed"))
        self.full_rank_gate = linear.use_full_rank_gate
        if self.full_rank_gate:
            self.g_proj = Linear(init, width, hidden, ("kda_heads", "embed"))
        else:
            self.g_a_proj = Linear(init, linear.head_dim, hidden, (None, "embed"))
            self.g_b_proj = Linear(init, width, linear.head_dim, ("kda_heads", "rank"))
        self.o_norm = RMSNorm(wide, linear.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(init, hidden, width, ("embed", "kda_heads"))

    def initial_decay(self, init: Init) -> jax.Array:
        """Draws A_log = log U(1, 16) per head, as in the paper's recipe."""
        return jnp.log(jax.random.uniform(init.next_key(), (self.heads,), jnp.float32, 1.0, 16.0))

    def initial_dt_bias(self, init: Init) -> jax.Array:
        """Returns the inverse softplus of a time step drawn log-uniformly from [0.001, 0.1]."""
        span = (jnp.log(0.001), jnp.log(0.1))
        dt = jnp.exp(jax.random.uniform(init.next_key(), (self.heads * self.head_dim,), jnp.float32, *span))
        return dt + jnp.log(-jnp.expm1(-dt))

    def __call__(
        self,
        x: Hidden,
        valid: Valid,
        state: KDAState | None = None,
        phase: Phase = "prefill",
        token_axes: tuple[str, ...] = (),
        segments: Positions | None = None,
        num_segments: int = 1,
    ) -> tuple[Float32[jax.Array, "b t d"], KDAState | KDADraft | None]:
        """Mixes x [b, t, d]: returns this device's heads' part of the sum for the stream, and the state after the call;
        in a verification, whose tokens may turn out not to be the sequence's, what they would change it by.

        `valid` tokens come first in each row. The rows' tokens are sharded over the mesh axes `token_axes`. `segments`
        are those of `Context`, with the states of all sequences, [b * n, ...], or with `num_segments`, which all begin
        with an empty state.
        """
        raw = jnp.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if segments is None:
            mixed, tail = self.convolve(raw, valid, state, token_axes)
        elif state is None:
            assert not token_axes
            mixed = self.convolve_segments(raw, segments)
        else:
            assert not token_axes
            mixed, tail = self.convolve_packed(raw, valid, state, segments)
        q, k, v = (rearrange(part, "b t (h k) -> b t h k", k=self.head_dim) for part in jnp.split(mixed, 3, axis=-1))
        g, beta = self.gates(x, valid)
        scale = self.head_dim**-0.5
        if state is not None and phase == "verify":
            # In float32 as `kda_step` is, so that the outputs are those of decode steps
            wide_q, wide_k, wide_v = (array.astype(jnp.float32) for array in (q, k, v))
            o, _ = kda(wide_q, wide_k, wide_v, g, beta, initial_state=state.S, normalize_qk=True, scale=scale)
            return self.gated_output(o.astype(v.dtype), x), KDADraft(raw, k, v, g, beta)
        if state is not None and phase == "decode":
            o, S = kda_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state.S, normalize_qk=True, scale=scale)
            o = o[:, None]
        elif segments is not None:
            ids = jnp.where(valid, segments, -1)
            packed = functools.partial(kda, q, k, v, g, beta, segment_ids=ids, normalize_qk=True, scale=scale)
            if state is None:
                o, S = packed(num_segments=num_segments, return_state=False)
            else:
                each = rearrange(state.S, "(b n) h k v -> b n h k v", b=len(x))
                o, S = packed(num_segments=each.shape[1], initial_state=each)
                S = rearrange(S, "b n h k v -> (b n) h k v")
        else:
            run = functools.partial(kda, q, k, v, g, beta, normalize_qk=True, scale=scale)
            before: jax.Array | None = None if state is None else state.S
            last = None
            if token_axes:
                _, update, transition = run(return_transition=True)
                before, last = scan_shards(
                    jnp.zeros_like(update) if before is None else before, transition, update, token_axes
                )
            o, S = run(initial_state=before)
            S = S if last is None else last
        return self.gated_output(o, x), None if state is None else KDAState(tail, S)

    def taps(self) -> Float32[jax.Array, "channels taps"]:
        """Returns the convolutions of q, k and v, side by side."""
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return jnp.concatenate([conv.weight[...] for conv in convs]).astype(jnp.float32)[:, 0]

    def convolve(
        self, raw: jax.Array, valid: Valid, state: KDAState | None, token_axes: tuple[str, ...] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """Computes SiLU(conv(raw)), and the raw values that the next call's first tokens will reach back to."""
        w = self.taps()
        t, reach = raw.shape[1], w.shape[-1] - 1
        before = jnp.zeros((raw.shape[0], reach, raw.shape[2]), raw.dtype) if state is None else state.tail
        before = shift_right(raw[:, -reach:].astype(before.dtype), before, token_axes)
        before_raw = before.astype(raw.dtype)

        def mixed(values: jax.Array, count: int) -> jax.Array:
            """Returns the result of `count` tokens, b t c, of their values and those of the `reach` before them."""
            y = sum(values[:, j : j + count].astype(jnp.float32) * w[:, j] for j in range(reach + 1))
            return jax.nn.silu(y).astype(raw.dtype)

        # The first tokens reach back to `before`; the others' values lie in `raw`, which is not copied behind it
        y = mixed(jnp.concatenate([before_raw, raw[:, :reach]], axis=1), min(reach, t))
        if t > reach:
            y = jnp.concatenate([y, mixed(raw, t - reach)], axis=1)
        counts = jnp.sum(valid, axis=1, dtype=jnp.int32)
        padded = jnp.concatenate([before_raw, raw], axis=1)
        tail = jnp.take_along_axis(padded, (counts[:, None] + jnp.arange(reach))[:, :, None], axis=1)
        return y, select_last(tail.astype(before.dtype), counts, t, token_axes)

    def convolve_segments(self, raw: jax.Array, segments: Positions) -> jax.Array:
        """Computes `convolve` of packed rows whose sequences all begin here: no tap reaches into another sequence."""
        w, t = self.taps(), raw.shape[1]
        reach = w.shape[-1] - 1

        def raw_before(distance: int) -> jax.Array:
            """Returns the raw values so many tokens before each in its own sequence, b t c."""
            if not distance:
                return raw
            own = jnp.pad(raw, ((0, 0), (distance, 0), (0, 0)))[:, :t]
            owner = jnp.pad(segments, ((0, 0), (distance, 0)), constant_values=-1)[:, :t]
            return jnp.where((owner == segments)[:, :, None], own, 0)

        y = sum(raw_before(reach - j).astype(jnp.float32) * w[:, j] for j in range(reach + 1))
        return jax.nn.silu(y).astype(raw.dtype)

    def convolve_packed(
        self, raw: jax.Array, valid: Valid, state: KDAState, segments: Positions
    ) -> tuple[jax.Array, jax.Array]:
        """Computes `convolve` of packed rows: the first tokens of each sequence reach back to its own tail."""
        w = self.taps()
        (rows, t, _), reach = raw.shape, w.shape[-1] - 1
        tail = rearrange(state.tail, "(b n) reach c -> b n reach c", b=rows).astype(raw.dtype)
        columns, sequences = jnp.arange(t), tail.shape[1]
        member = (segments[:, None] == jnp.arange(sequences)[:, None]) & valid[:, None]  # b n t
        counts = jnp.sum(member, axis=-1)
        first = jnp.min(jnp.where(member, columns, t), axis=-1)
        owner = jnp.clip(segments, 0, sequences - 1)
        nth = columns - jnp.take_along_axis(first, owner, axis=1)  # among its sequence's tokens of this call
        row = jnp.arange(rows)[:, None]

        def raw_before(distance: int) -> jax.Array:
            """Returns the raw values so many tokens before each, b t c."""
            own = jnp.roll(raw, distance, axis=1)
            carried = tail[row, owner, jnp.clip(reach - distance + nth, 0, reach - 1)]
            return jnp.where((nth >= distance)[:, :, None], own, carried)

        y = sum(raw_before(reach - j).astype(jnp.float32) * w[:, j] for j in range(reach + 1))
        # The last `reach` of the tail and the tokens after it
        place = counts[:, :, None] + jnp.arange(reach) - reach
        own = raw[row[:, :, None], jnp.clip(first[:, :, None] + place, 0, t - 1)]
        carried = jnp.take_along_axis(tail, jnp.clip(place + reach, 0, reach - 1)[..., None], axis=2)
        after = jnp.where((place >= 0)[..., None], own, carried)
        y = jax.nn.silu(y).astype(raw.dtype)
        return y, rearrange(after, "b n reach c -> (b n) reach c").astype(state.tail.dtype)

    def gates(self, x: Hidden, valid: Valid) -> tuple[Float32[jax.Array, "b t h k"], Float32[jax.Array, "b t h"]]:
        """Computes log-decay g <= 0 per key channel and step size beta in (0, 1) per head, both zero for padding.

        With a lower bound g = bound * sigmoid(exp(A_log) * f), and else g = -exp(A_log) * softplus(f).
        """
        f = self.f_b_proj(self.f_a_proj(x), dtype=jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        f = rearrange(f, "b t (h k) -> b t h k", k=self.head_dim)
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))[:, None]
        bound = self.lower_bound
        g = -rate * jax.nn.softplus(f) if bound is None else bound * jax.nn.sigmoid(rate * f)
        beta = jax.nn.sigmoid(self.b_proj(x, dtype=jnp.float32))
        return jnp.where(valid[:, :, None, None], g, 0.0), jnp.where(valid[:, :, None], beta, 0.0)

    def gated_output(self, o: jax.Array, x: Hidden) -> Float32[jax.Array, "b t d"]:
        """Computes o_proj(RMSNorm(o) * sigmoid(z)): the gate comes after the norm."""
        z = self.g_proj(x) if self.full_rank_gate else self.g_b_proj(self.g_a_proj(x))
        z = rearrange(z, "b t (h v) -> b t h v", v=self.head_dim)
        # a float32 norm is computed in float32
        normed = self.o_norm(o.astype(jnp.promote_types(x.dtype, self.o_norm.weight.dtype)))
        y = normed.astype(jnp.float32) * jax.nn.sigmoid(z.astype(jnp.float32))
        return self.o_proj(rearrange(y.astype(x.dtype), "b t h v -> b t (h v)"), dtype=jnp.float32)


def take_in(state: KDAState, draft: KDADraft, counts: Int32[jax.Array, "b"]) -> KDAState:
    """Returns the states of rows after the first `counts` tokens of their drafts: 0 leaves a state as it is."""
    taken = jnp.arange(draft.raw.shape[1]) < counts[:, None]
    # No decay and no step: such a token leaves the state as it is, to the bit
    g, beta = jnp.where(taken[:, :, None, None], draft.g, 0), jnp.where(taken[:, :, None], draft.beta, 0)
    k, v = draft.k.astype(jnp.float32), draft.v.astype(jnp.float32)
    _, S = kda(k, k, v, g, beta, initial_state=state.S, normalize_qk=True)
    padded = jnp.concatenate([state.tail, draft.raw.astype(state.tail.dtype)], axis=1)
    columns = counts[:, None] + jnp.arange(state.tail.shape[1])
    return KDAState(jnp.take_along_axis(padded, columns[:, :, None], axis=1), S)
