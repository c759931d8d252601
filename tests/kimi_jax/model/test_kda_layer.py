"""The layer around the delta rule: short convolutions, gates, output gate, and the whole layer against the formulas of
Kimi Linear (arXiv 2510.26692) in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.toy import toy_config
from kimi_jax.config_json import from_dict
from kimi_jax.model.context import KDAState
from kimi_jax.model.kda import KDA
from kimi_jax.model.param import Init

HEADS, DIM, HIDDEN = 2, 8, 24
WIDTH = HEADS * DIM
LINEAR = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": DIM, "num_heads": HEADS, "short_conv_kernel_size": 4}
TEXT = from_dict(
    toy_config("kimi-linear", hidden_size=HIDDEN, num_hidden_layers=2, linear_attn_config=LINEAR, rms_norm_eps=1e-2)
).text
LENGTHS = np.array([7, 2, 1, 5])


@pytest.fixture(scope="module")
def layer():
    kda = KDA(Init(jax.random.key(0), jnp.dtype(jnp.float32), std=0.4), TEXT)
    kda.o_norm.weight[...] = jnp.linspace(0.5, 1.5, DIM)
    return kda


def random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def valid(lengths, t):
    return jnp.asarray(np.arange(t) < np.asarray(lengths)[:, None])


def weight(module):
    return np.asarray(module.weight[...], np.float64)


def taps(layer):
    """Returns the taps of q, k and v, [3 * channels, 4]."""
    return np.concatenate([weight(c)[:, 0] for c in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolved(raw, layer, tail):
    """Computes y_t = sum_j w[j] u_{t-3+j} for one row, u continued to the left by `tail`; then SiLU."""
    u, w = np.concatenate([tail, raw]).astype(np.float64), taps(layer)
    return silu(np.array([sum(w[:, j] * u[i + j] for j in range(4)) for i in range(len(raw))]))


def state(tail, batch):
    return KDAState(jnp.asarray(tail), jnp.zeros((batch, HEADS, DIM, DIM)))


# --- short convolution ------------------------------------------------------------------------------------------------


def test_the_last_tap_meets_the_current_token(layer):
    # Given one token that is not zero, the next three have its echo with the taps from the last to the first
    raw = np.zeros((1, 6, 3 * WIDTH), np.float32)
    raw[0, 1] = random(3 * WIDTH)
    y, _ = layer.convolve(jnp.asarray(raw), valid([6], 6), None)
    expected = np.zeros((6, 3 * WIDTH))
    expected[1:5] = silu(raw[0, 1].astype(np.float64) * taps(layer)[:, ::-1].T)
    np.testing.assert_allclose(y[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("carried", [False, True], ids=["start", "carried"])
def test_convolution_and_tail_of_ragged_rows(layer, carried):
    # Given rows of 7, 2, 1 and 5 valid tokens, with and without raw values of earlier tokens
    raw = random(4, 7, 3 * WIDTH)
    before = random(4, 3, 3 * WIDTH, seed=1) if carried else np.zeros((4, 3, 3 * WIDTH), np.float32)
    y, tail = layer.convolve(jnp.asarray(raw), valid(LENGTHS, 7), state(before, 4) if carried else None)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(y[row, :length], convolved(raw[row], layer, before[row])[:length], rtol=0, atol=2e-6)
        # Then the tail is the last three raw values, bit by bit, and no padding
        np.testing.assert_array_equal(tail[row], np.concatenate([before[row], raw[row, :length]])[-3:])


def test_a_row_without_tokens_keeps_its_tail(layer):
    before = random(1, 3, 3 * WIDTH)
    _, tail = layer.convolve(jnp.asarray(random(1, 2, 3 * WIDTH)), valid([0], 2), state(before, 1))
    np.testing.assert_array_equal(tail, before)


# --- gates ------------------------------------------------------------------------------------------------------------


def gates(x, layer):
    """Computes g [t, heads, dim] and beta [t, heads] of one row, in float64."""
    f = x @ weight(layer.f_a_proj).T @ weight(layer.f_b_proj).T + np.asarray(layer.dt_bias[...], np.float64)
    decay = np.exp(np.asarray(layer.A_log[...], np.float64))
    g = -decay[:, None] * np.logaddexp(0, f.reshape(-1, HEADS, DIM))
    return g, sigmoid(x @ weight(layer.b_proj).T)


def test_gates(layer):
    x = 3 * random(4, 7, HIDDEN)
    g, beta = layer.gates(jnp.asarray(x), valid(LENGTHS, 7))
    assert g.dtype == beta.dtype == jnp.float32
    for row, length in enumerate(LENGTHS):
        want_g, want_beta = gates(x[row, :length].astype(np.float64), layer)
        np.testing.assert_allclose(g[row, :length], want_g, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(beta[row, :length], want_beta, rtol=1e-5)
        # Padding neither decays nor writes
        assert not np.asarray(g[row, length:]).any() and not np.asarray(beta[row, length:]).any()
    real = np.asarray(valid(LENGTHS, 7))
    assert (np.asarray(g)[real] < 0).all() and (np.asarray(g) <= 0).all()
    assert ((np.asarray(beta)[real] > 0) & (np.asarray(beta)[real] < 1)).all()


def test_initial_gates_are_those_of_the_recipe():
    # A_log = log U(1, 16); softplus(dt_bias) is log-uniform on [0.001, 0.1]
    linear = LINEAR | {"num_heads": 64, "head_dim": 32}
    config = from_dict(toy_config("kimi-linear", hidden_size=4, num_hidden_layers=2, linear_attn_config=linear)).text
    kda = KDA(Init(jax.random.key(1), jnp.dtype(jnp.bfloat16)), config)
    assert kda.A_log[...].dtype == kda.dt_bias[...].dtype == jnp.float32
    decay = np.exp(np.asarray(kda.A_log[...], np.float64))
    dt = np.logaddexp(0, np.asarray(kda.dt_bias[...], np.float64))
    assert decay.shape == (64,) and 1 <= decay.min() < 3 and 14 < decay.max() <= 16
    assert dt.shape == (2048,) and 1e-3 * (1 - 1e-3) <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1 * (1 + 1e-3)
    assert np.median(dt) == pytest.approx(0.01, rel=0.15)  # a uniform distribution would have its median at 0.05


# --- output and the whole ---------------------------------------------------------------------------------------------


def gated(o, x, layer):
    """Computes W_o concat(RMSNorm(o) * sigmoid(z)) for one row."""
    z = (x @ weight(layer.g_a_proj).T @ weight(layer.g_b_proj).T).reshape(-1, HEADS, DIM)
    normed = o / np.sqrt((o**2).mean(-1, keepdims=True) + TEXT.rms_norm_eps) * weight(layer.o_norm)
    return (normed * sigmoid(z)).reshape(-1, WIDTH) @ weight(layer.o_proj).T


def test_the_output_gate_comes_after_the_norm(layer):
    o, x = random(1, 5, HEADS, DIM), 2 * random(1, 5, HIDDEN, seed=1)
    found = layer.gated_output(jnp.asarray(o), jnp.asarray(x))
    np.testing.assert_allclose(found[0], gated(o[0].astype(np.float64), x[0], layer), rtol=0, atol=5e-6)


def mixed(x, layer):
    """Computes the whole layer for one row from its start: outputs [t, hidden] and the final state."""
    x = x.astype(np.float64)
    raw = np.concatenate([x @ weight(p).T for p in (layer.q_proj, layer.k_proj, layer.v_proj)], axis=1)
    q, k, v = convolved(raw, layer, np.zeros((3, 3 * WIDTH))).reshape(-1, 3, HEADS, DIM).swapaxes(0, 1)
    q, k = (z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6) for z in (q, k))
    g, beta = gates(x, layer)
    S, outputs = np.zeros((HEADS, DIM, DIM)), []
    for i in range(len(x)):
        for h in range(HEADS):
            S[h] = np.exp(g[i, h])[:, None] * S[h]
            S[h] += beta[i, h] * np.outer(k[i, h], v[i, h] - S[h].T @ k[i, h])
        outputs.append([S[h].T @ q[i, h] * DIM**-0.5 for h in range(HEADS)])
    return gated(np.array(outputs), x, layer), S


def test_the_layer_follows_the_formulas_of_the_paper(layer):
    x = random(4, 7, HIDDEN, seed=2)
    run = nnx.jit(lambda layer, x, valid, state, phase: layer(x, valid, state, phase), static_argnums=4)
    begin = state(np.zeros((4, 3, 3 * WIDTH), np.float32), 4)
    y, after = run(layer, jnp.asarray(x), valid(LENGTHS, 7), begin, "prefill")
    stateless, nothing = run(layer, jnp.asarray(x), valid(LENGTHS, 7), None, "prefill")
    assert nothing is None
    for row, length in enumerate(LENGTHS):
        want, S = mixed(x[row, :length], layer)
        np.testing.assert_allclose(y[row, :length], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(stateless[row, :length], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(after.S[row], S, rtol=0, atol=5e-6)
    # One more token takes the recurrent step, after the last token of each row
    token = random(4, 1, HIDDEN, seed=3)
    y, after = run(layer, jnp.asarray(token), valid(np.ones(4), 1), after, "decode")
    for row, length in enumerate(LENGTHS):
        want, S = mixed(np.concatenate([x[row, :length], token[row]]), layer)
        np.testing.assert_allclose(y[row], want[-1:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(after.S[row], S, rtol=0, atol=5e-6)
