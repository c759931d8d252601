"""The projections around `mla_decode`, in plain JAX and as interpreted kernels, against float64."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import dots, relative_rmse

from pallas_kernels import mla_output, mla_query
from pallas_kernels.hardware import CHIPS
from pallas_kernels.mla_projections import reference, shapes

KERNEL = importlib.import_module("pallas_kernels.mla_projections.mosaic_tpu")
V5P = CHIPS["v5p"].facts
EPS = 1e-5
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])


def query_arguments(shape, dtype):
    """Returns mla_query's arguments and the reference's, which have whole columns, and angles in radians for their cos
    and sin."""
    rng = np.random.default_rng(0)

    def random(*size):
        return jnp.asarray(rng.normal(size=size), dtype)

    angles = rng.uniform(0, 100, size=(shape.B, shape.R // 2)) if shape.rotates else None
    doubled = None if angles is None else np.concatenate([angles, angles], axis=1)
    rotation = None if doubled is None else tuple(jnp.asarray(f(doubled), jnp.float32) for f in (np.cos, np.sin))
    low = random(shape.B, shape.C), random(shape.B, shape.L + shape.R)
    norms = (1 + 0.1 * random(shape.C) if shape.norms else None), 1 + 0.1 * random(shape.L)
    weights = random(shape.H * (shape.N + shape.R), shape.C), random(shape.H * 2 * shape.N, shape.L)
    return (low[0], low[1][None], rotation, *norms, *weights), (*low, angles, *norms, *weights)


def output_arguments(shape, dtype):
    rng = np.random.default_rng(1)
    sizes = (shape.B, shape.H, shape.L), (shape.H * 2 * shape.N, shape.L), (shape.D, shape.H * shape.N)
    sizes += ((shape.B, shape.H * shape.N),) if shape.gates else ()
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def query(shape, implementation):
    return jax.jit(functools.partial(mla_query, heads=shape.H, eps=EPS, implementation=implementation))


def output(implementation):
    return jax.jit(functools.partial(mla_output, implementation=implementation))


# Any two of a shape, an implementation and a dtype are together in a quick case
AGAINST_FLOAT64 = [
    pytest.param(
        shape, implementation, dtype, tolerance,
        id=f"{shape.name}-{implementation}-{dtype.__name__}",
        marks=[] if (i + j + k) % 2 == 0 else [pytest.mark.slow],
    )
    for i, shape in enumerate(shapes.KIMI + shapes.AWKWARD)
    for j, implementation in enumerate(("xla", "mosaic_tpu"))
    for k, (dtype, tolerance) in enumerate([(jnp.float32, 2e-6), (jnp.bfloat16, 5e-3)])
]  # fmt: skip


@pytest.mark.parametrize(("shape", "implementation", "dtype", "tolerance"), AGAINST_FLOAT64)
def test_against_float64(shape, implementation, dtype, tolerance):
    given, exact = query_arguments(shape, dtype)
    found = query(shape, implementation)(*given)
    expected = reference.mla_query(*exact, heads=shape.H, eps=EPS)
    for one, want in zip(found, expected, strict=True):
        assert one.dtype == dtype and relative_rmse(one, want) <= tolerance
    given = output_arguments(shape, dtype)
    found = output(implementation)(*given)
    assert found.dtype == jnp.float32 and relative_rmse(found, reference.mla_output(*given)) <= tolerance


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "shards"), [(shapes.KIMI[0], 8), (shapes.AWKWARD[1], 4), (shapes.KIMI[1], 8)])
def test_columns_that_devices_have_gathered(shape, shards, dtype, implementation):
    # Given what several devices have of the low ranks, queries' columns before the others where they have a low rank
    (q_a, kv_a, *rest), _ = query_arguments(shape, dtype)
    parts = [jnp.stack(jnp.split(array, shards, axis=1)) for array in (q_a, kv_a[0])]
    gathered = (None, jnp.concatenate(parts, axis=2)) if shape.norms else (q_a, parts[1])
    found = query(shape, implementation)(*gathered, *rest)
    # Then they are joined
    for one, want in zip(found, query(shape, implementation)(q_a, kv_a, *rest), strict=True):
        np.testing.assert_array_equal(one, want)


def packed_arguments(shape, shards, dtype):
    """Returns mla_output's arguments with partial attentions over several caches; float64 attentions over all."""
    rng = np.random.default_rng(4)
    out, lse = rng.normal(size=(shards, shape.B, shape.H, shape.L)), 9 * rng.normal(size=(shards, shape.B, shape.H, 1))
    lse[0], lse[:, -1] = -np.inf, -np.inf  # a cache without tokens, and a sequence
    out = np.where(np.isinf(lse), 0, out)
    packed = np.concatenate([out, lse], axis=-1).astype(np.float32)
    weights = np.exp(packed[..., -1:].astype(np.float64))
    total = weights.sum(0)
    whole = (weights * packed[..., :-1].astype(np.float64)).sum(0) / np.where(total == 0, 1, total)
    return (jnp.asarray(packed), *output_arguments(shape, dtype)[1:]), whole


@IMPLEMENTATIONS
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize(("shape", "shards"), [(shapes.KIMI[0], 8), (shapes.AWKWARD[0], 3), (shapes.AWKWARD[3], 2)])
def test_partial_attentions_are_merged(monkeypatch, shape, shards, dtype, tolerance, implementation):
    given, whole = packed_arguments(shape, shards, dtype)
    expected = reference.mla_output(whole, *given[1:])
    found = output(implementation)(*given)
    assert relative_rmse(found, expected) <= tolerance
    # Also where they are too many for vector memory
    monkeypatch.setattr(KERNEL, "MERGED_BYTES", 0)
    assert relative_rmse(output(implementation)(*given), expected) <= tolerance


@IMPLEMENTATIONS
def test_without_rotation_channels_stay_as_they_are(implementation):
    shape = shapes.AWKWARD[3]
    (q_a, kv_a, *rest), _ = query_arguments(shape, jnp.bfloat16)
    _, latents = query(shape, implementation)(q_a, kv_a, *rest)
    np.testing.assert_array_equal(latents[:, shape.L :], kv_a[0, :, shape.L :])


@IMPLEMENTATIONS
def test_rotation_keeps_the_products_of_two_tokens_at_one_distance(implementation):
    # Given queries and keys of the same channels at positions p and p + 3
    shape = shapes.ProjectionShape("", 4, 128, 128, 128, 64, 1, 128)
    (q_a, kv_a, _, *rest), _ = query_arguments(shape, jnp.float32)
    same = q_a[:1].repeat(4, 0), kv_a[:, :1].repeat(4, 1)
    frequency = 50000.0 ** (-np.arange(32) / 32)

    def products(start):
        angles = np.tile((start + np.arange(4))[:, None] * frequency, 2)
        turn = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
        q, latents = query(shape, implementation)(*same, turn, *rest)
        q_rope, k_rope = q[:, 0, shape.L :], latents[0, shape.L :]
        return float(q_rope[3] @ k_rope), float(q_rope[1] @ k_rope)

    # When both move, then their product stays; at another distance it changes
    for near, far in zip(products(0), products(1000), strict=True):
        assert near == pytest.approx(far, rel=1e-3)
    assert abs(products(0)[0] - products(0)[1]) > 1e-2 * abs(products(0)[0])


def test_output_on_two_cores_and_in_tiles(monkeypatch):
    monkeypatch.setattr(KERNEL, "chip", lambda: V5P)
    monkeypatch.setattr(KERNEL, "STEP_BYTES", 2**16)
    for columns in (768, 384):  # three tiles for each core; tiles that two cores cannot divide
        given = output_arguments(shapes.ProjectionShape("", 9, 128, 128, 128, 64, 2, columns), jnp.bfloat16)
        assert relative_rmse(output("mosaic_tpu")(*given), reference.mla_output(*given)) <= 5e-3


@IMPLEMENTATIONS
def test_rows_do_not_meet(implementation):
    shape = shapes.AWKWARD[1]
    (q_a, kv_a, *rest), _ = query_arguments(shape, jnp.float32)
    clean = query(shape, implementation)(q_a, kv_a, *rest)
    spoilt = query(shape, implementation)(q_a.at[3].set(jnp.nan), kv_a.at[:, 3].set(jnp.nan), *rest)
    for one, other in zip(clean, spoilt, strict=True):
        assert np.isnan(other[3]).all()
        np.testing.assert_array_equal(np.delete(one, 3, 0), np.delete(other, 3, 0))
    o, *weights = output_arguments(shape, jnp.float32)
    spoilt = output(implementation)(o.at[3].set(jnp.nan), *weights)
    np.testing.assert_array_equal(np.isnan(spoilt).all(1), np.arange(shape.B) == 3)


def test_no_race_and_nothing_read_out_of_bounds_or_uninitialised():
    shape = shapes.AWKWARD[1]
    given, exact = query_arguments(shape, jnp.float32)
    of_heads = output_arguments(shape, jnp.float32)
    careful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        found = KERNEL.mla_query(*given, heads=shape.H, eps=EPS, interpret=careful)
        assert not interpret_pallas_call.races.races_found
        added = KERNEL.mla_output(*of_heads, interpret=careful)
        assert not interpret_pallas_call.races.races_found
        packed, whole = packed_arguments(shape, 2, jnp.float32)
        merged = KERNEL.mla_output(*packed, interpret=careful)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    for one, want in zip(found, reference.mla_query(*exact, heads=shape.H, eps=EPS), strict=True):
        assert relative_rmse(one, want) <= 2e-6
    assert relative_rmse(added, reference.mla_output(*of_heads)) <= 2e-6
    assert relative_rmse(merged, reference.mla_output(whole, *packed[1:])) <= 2e-6


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_float32_is_multiplied_as_float32(dtype, precision):
    shape = shapes.AWKWARD[1]
    given, _ = query_arguments(shape, dtype)
    run = functools.partial(KERNEL.mla_query, heads=shape.H, eps=EPS, interpret=True)
    found = [
        *dots(jax.make_jaxpr(run)(*given).jaxpr),
        *dots(
            jax.make_jaxpr(functools.partial(KERNEL.mla_output, interpret=True))(*output_arguments(shape, dtype)).jaxpr
        ),
    ]
    assert len(found) >= 6
    for equation in found:
        assert equation.invars[0].aval.dtype == equation.invars[1].aval.dtype == dtype
        assert equation.params["precision"] == (getattr(jax.lax.Precision, precision),) * 2
        assert equation.params["preferred_element_type"] == jnp.float32


@IMPLEMENTATIONS
def test_gradient(implementation):
    # Given one head of three tokens, and in float64 a small change of every argument
    shape = shapes.ProjectionShape("", 3, 128, 128, 128, 64, 1, 128)
    given, (q_a, kv_a, angles, q_norm, *rest) = query_arguments(shape, jnp.float32)
    cotangents = [np.random.default_rng(2).normal(size=size) for size in ((3, 1, 192), (3, 192))]

    def loss(q_a, kv_a, q_norm):
        outs = mla_query(q_a, kv_a[None], given[2], q_norm, *given[4:], heads=1, eps=EPS, implementation=implementation)
        return sum(jnp.sum(out * jnp.asarray(one, jnp.float32)) for out, one in zip(outs, cotangents, strict=True))

    slopes = jax.grad(loss, (0, 1, 2))(q_a, kv_a, q_norm)
    along = [np.random.default_rng(3).normal(size=array.shape) for array in (q_a, kv_a, q_norm)]

    def moved(step):
        new = [
            np.asarray(array, np.float64) + step * way for array, way in zip((q_a, kv_a, q_norm), along, strict=True)
        ]
        outs = reference.mla_query(new[0], new[1], angles, new[2], *rest, heads=1, eps=EPS)
        return sum(np.sum(out * one) for out, one in zip(outs, cotangents, strict=True))

    found = sum(np.sum(slope * way) for slope, way in zip(slopes, along, strict=True))
    np.testing.assert_allclose(found, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_a": jnp.zeros((1, 3, 192))}, "mla_query: q_a has shape (2, 128), expected [B=3, C=128]"),
        (
            {"q_a": None},
            "mla_query: kv_a has 192 columns on each of 1 devices, expected as many devices' shares of 128 of queries, "
            "128 of the latent, and rotated ones",
        ),
        ({"kv_norm": jnp.zeros(64)}, "mla_query: kv_b has shape (256, 128), expected [both, L=64]"),
        ({"kv_norm": jnp.zeros(128, jnp.bfloat16)}, "mla_query: kv_norm is bfloat16, expected float32"),
        ({"q_norm": jnp.zeros(64)}, "mla_query: q_norm has shape (64,), expected [C=128]"),
        (
            {"rotation": (jnp.zeros((2, 64)), jnp.zeros((2, 32)))},
            "mla_query: sin has shape (2, 32), expected [B=2, 64]",
        ),
        (
            {"heads": 3},
            "mla_query: q_b has 192 rows and kv_b 256, expected multiples of 3 heads, of more than the 64 rotated "
            "channels each",
        ),
    ],
)
def test_bad_arguments_of_a_query_are_refused(change, message):
    good = {
        "q_a": jnp.zeros((2, 128)),
        "kv_a": jnp.zeros((1, 2, 192)),
        "rotation": (jnp.zeros((2, 64)), jnp.zeros((2, 64))),
        "q_norm": jnp.zeros(128),
        "kv_norm": jnp.zeros(128),
        "q_b": jnp.zeros((192, 128)),
        "kv_b": jnp.zeros((256, 128)),
        "heads": 1,
        "eps": EPS,
    }
    assert [one.shape for one in mla_query(**good)] == [(2, 1, 192), (2, 192)]
    with pytest.raises(ValueError) as raised:
        mla_query(**good | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_b": jnp.zeros((256, 64))}, "mla_output: kv_b has shape (256, 64), expected [both, L=128]"),
        ({"o_proj": jnp.zeros((128, 128), jnp.bfloat16)}, "mla_output: o_proj is bfloat16, expected float32"),
        (
            {"o_proj": jnp.zeros((128, 256))},
            "mla_output: kv_b has 256 rows and o_proj 256 columns, expected keys and values, and values, of 1 heads",
        ),
        ({"gate": jnp.zeros((2, 64))}, "mla_output: gate has shape (2, 64), expected [B=2, 128]"),
        ({"gate": jnp.zeros((2, 128), jnp.bfloat16)}, "mla_output: gate is bfloat16, expected float32"),
    ],
)
def test_bad_arguments_of_an_output_are_refused(change, message):
    good = {"o": jnp.zeros((2, 1, 128)), "kv_b": jnp.zeros((256, 128)), "o_proj": jnp.zeros((128, 128))}
    assert mla_output(**good).shape == (2, 128)
    with pytest.raises(ValueError) as raised:
        mla_output(**good | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (shapes.ProjectionShape("", 129, 128, 128, 128, 64, 1, 128), jnp.float32, "B is 129, expected 1 to 128"),
        (shapes.ProjectionShape("", 2, 128, 96, 128, 64, 1, 128), jnp.float32, "L is 96, expected a multiple of 128"),
        (
            shapes.ProjectionShape("", 2, 128, 128, 128, 64, 1, 128),
            jnp.float16,
            "x is float16, expected bfloat16 or float32",
        ),
        (
            shapes.ProjectionShape("", 2, 128, 128, 128, 64, 12, 128),
            jnp.float32,
            "there are 12 heads, expected 1, 2, 4 or a multiple of 8",
        ),
    ],
)
def test_what_the_kernels_cannot_serve_is_refused_when_asked_for(shape, dtype, reason):
    given, _ = query_arguments(shape, dtype)
    for op, arguments, options in (
        (mla_query, given, {"heads": shape.H, "eps": EPS}),
        (mla_output, output_arguments(shape, dtype), {}),
    ):
        with pytest.raises(ValueError) as raised:
            op(*arguments, **options, implementation="mosaic_tpu")
        assert str(raised.value) == f"{op.__name__}: the mosaic_tpu kernel cannot serve this call: {reason}"
        jax.eval_shape(functools.partial(op, **options), *arguments)
