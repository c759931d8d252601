"""A mixture, in plain JAX and as the interpreted kernel, against float64 loops over tokens."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_numerics import relative_rmse

from pallas_kernels import Int4, mixture
from pallas_kernels.activations import silu_gated
from pallas_kernels.formats import as_weight
from pallas_kernels.hardware import CHIPS
from pallas_kernels.mixture import reference, shapes

MODULES = [
    importlib.import_module(f"pallas_kernels.{name}")
    for name in ("mixture.mosaic_tpu", "mixture.stages", "grouped_matmul.mosaic_int4")
]
KERNEL = MODULES[0]
V5E, V5P, TPU7X = (CHIPS[name].facts for name in ("v5e", "v5p", "tpu7x"))
FORMS = pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
TOLERANCES = [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)]

quantise = jax.jit(Int4.from_dense)  # op by op, each shape compiles sixteen programs


def on(chip, monkeypatch):
    for module in MODULES:
        if hasattr(module, "chip"):
            monkeypatch.setattr(module, "chip", lambda: chip)


def experts(rng, shape, dtype, int4):
    """Draws gate, up and down."""

    def matrix(out, in_):
        values = jnp.asarray(rng.normal(size=(shape.num_local, out, in_)), jnp.float32)
        return quantise(values) if int4 else values.astype(dtype)

    return matrix(shape.N, shape.K), matrix(shape.N, shape.K), matrix(shape.K, shape.N)


def arguments(shape, dtype, int4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(shape.T, shape.K)), dtype)
    chosen = jnp.asarray([rng.permutation(shape.experts)[: shape.J] for _ in range(shape.T)], jnp.int32)
    weights = jnp.asarray(rng.uniform(size=chosen.shape), jnp.float32)
    return x, chosen, weights, *experts(rng, shape, dtype, int4)


def run(implementation):
    return jax.jit(lambda *arrays: mixture(*arrays[:-1], first=arrays[-1], implementation=implementation))


PLAIN, INTERPRETED = run("xla"), run("mosaic_tpu")


def against_float64():
    """Returns the cases of shapes, forms and dtypes. Any two of a shape, a form and a dtype are together in a quick one
    (Kimi's own shape is not INT4)."""
    cases = [
        (shape, int4, dtype, tolerance, (i + int4 + j) % 2 == 0)
        for i, shape in enumerate(shapes.AWKWARD)
        for int4 in (False, True)
        for j, (dtype, tolerance) in enumerate(TOLERANCES)
    ]
    cases += [(shape, False, *TOLERANCES[j], j == 1) for shape in shapes.KIMI for j in (0, 1)]
    for shape, int4, dtype, tolerance, quick in cases:
        name = f"{shape.name}-{'int4' if int4 else 'dense'}-{dtype.__name__}"
        yield pytest.param(shape, int4, dtype, tolerance, id=name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("shape", "int4", "dtype", "tolerance"), list(against_float64()))
def test_against_float64(shape, int4, dtype, tolerance):
    given = arguments(shape, dtype, int4)
    expected = reference.mixture(*given, shape.first)
    for found in (PLAIN(*given, shape.first), INTERPRETED(*given, shape.first)):
        assert found.dtype == jnp.float32
        assert relative_rmse(found, expected) <= tolerance
        np.testing.assert_array_equal(found[(expected == 0).all(-1)], 0)


@pytest.mark.parametrize(
    ("chip", "dtype", "tolerance", "int4"),
    [
        pytest.param(V5E, jnp.bfloat16, 4e-3, True, id="v5e-int4"),
        pytest.param(V5P, jnp.bfloat16, 4e-3, True, id="v5p-int4", marks=pytest.mark.slow),
        pytest.param(TPU7X, jnp.bfloat16, 4e-3, True, id="tpu7x-int4", marks=pytest.mark.slow),
        pytest.param(V5P, jnp.float32, 1e-6, True, id="v5p-float32-int4", marks=pytest.mark.slow),
        pytest.param(V5P, jnp.bfloat16, 4e-3, False, id="v5p-dense"),
    ],
)
def test_few_rows_in_block_diagonal_form_and_two_cores(chip, dtype, tolerance, int4, monkeypatch):
    # Groups of up to 8 rows, of up to 16 and of more; an odd number of visits, and none
    on(chip, monkeypatch)
    kernel = run("mosaic_tpu")
    for shape in (shapes.AWKWARD[3], shapes.AWKWARD[2], shapes.AWKWARD[1]):
        given = arguments(shape, dtype, int4)
        assert relative_rmse(kernel(*given, shape.first), reference.mixture(*given, shape.first)) <= tolerance


@FORMS
def test_every_token_to_one_expert_and_to_none(int4):
    shape = shapes.MixtureShape("", 40, 1, 128, 128, 6, 2, 3)
    x, _, weights, *matrices = arguments(shape, jnp.float32, int4)
    for expert in (1, 2, 4, -1):
        chosen = jnp.full((40, 1), expert, jnp.int32)
        expected = reference.mixture(x, chosen, weights, *matrices, 2)
        assert expected.any() == (expert in (2, 4))
        for op in (PLAIN, INTERPRETED):
            assert relative_rmse(op(x, chosen, weights, *matrices, 2), expected) <= 1e-6


@FORMS
def test_a_row_that_is_not_finite_stays_alone(int4):
    shape = shapes.AWKWARD[2]
    x, *rest = arguments(shape, jnp.float32, int4)
    expected = reference.mixture(x, *rest, 0)
    for op in (PLAIN, INTERPRETED):
        found = np.asarray(op(x.at[5].set(jnp.nan), *rest, 0))
        assert np.isnan(found[5]).all()
        assert relative_rmse(np.delete(found, 5, 0), np.delete(expected, 5, 0)) <= 1e-6


def test_an_expert_that_no_token_chose_may_hold_anything():
    # Given as many tokens as a CPU multiplies by all experts
    shape = shapes.MixtureShape("", 8, 2, 128, 128, 6, 1, 4)
    x, chosen, weights, *matrices = arguments(shape, jnp.float32, int4=False)
    chosen = jnp.where(chosen == 2, -1, chosen)
    expected = reference.mixture(x, chosen, weights, *matrices, 1)
    poisoned = [matrix.at[1].set(jnp.nan) for matrix in matrices]
    assert relative_rmse(PLAIN(x, chosen, weights, *poisoned, 1), expected) <= 1e-6


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_choices(data):
    # Given tokens with up to three of seven experts each, four of which are on this device
    shape = shapes.MixtureShape("", 20, 3, 128, 128, 7, 2, 4)
    x, _, weights, *matrices = arguments(shape, jnp.float32, int4=True)
    one = st.lists(st.integers(0, 6), max_size=3, unique=True).map(lambda experts: [*experts, -1, -1, -1][:3])
    chosen = jnp.asarray(data.draw(st.lists(one, min_size=20, max_size=20)), jnp.int32)
    found = INTERPRETED(x, chosen, weights, *matrices, 2)
    assert relative_rmse(found, reference.mixture(x, chosen, weights, *matrices, 2)) <= 1e-6


@pytest.mark.parametrize(
    ("chip", "int4"),
    [
        pytest.param(V5P, True, id="v5p-int4", marks=pytest.mark.slow),
        pytest.param(None, False, id="v6e-dense"),
        pytest.param(V5P, False, id="v5p-dense", marks=pytest.mark.slow),
        pytest.param(None, True, id="v6e-int4", marks=pytest.mark.slow),
    ],
)
def test_steps_in_tiles_and_parts(chip, int4, monkeypatch):
    if chip:
        on(chip, monkeypatch)
    for module, name in ((1, "STEP_BYTES"), (1, "PART_WEIGHTS"), (2, "SHARED_PART_WEIGHTS")):
        monkeypatch.setattr(MODULES[module], name, 2**16)
    shape = shapes.MixtureShape("", 40, 2, 1024, 512, 6, 1, 4)
    given = arguments(shape, jnp.bfloat16, int4)
    assert relative_rmse(run("mosaic_tpu")(*given, 1), reference.mixture(*given, 1)) <= 4e-3


def test_visits_of_as_many_rows_as_are_gathered_at_once(monkeypatch):
    # Given two cores, and experts with up to three times as many rows, so that a core has some of an expert's visits
    on(V5P, monkeypatch)
    monkeypatch.setattr(KERNEL, "VISIT_ROWS", 16)
    shape = shapes.MixtureShape("", 60, 2, 128, 128, 5, 1, 3)
    given = arguments(shape, jnp.float32, int4=False)
    assert relative_rmse(run("mosaic_tpu")(*given, 1), reference.mixture(*given, 1)) <= 1e-6


def test_what_fits_a_chip_with_less_vector_memory(monkeypatch):
    on(V5P, monkeypatch)
    fits = KERNEL.fits
    assert fits(292, 7168) and not fits(293, 7168) and fits(512, 2304)


@pytest.mark.parametrize(
    ("chip", "int4"),
    [
        pytest.param(V5E, True, id="v5e-int4"),
        pytest.param(None, False, id="v6e-dense"),
        pytest.param(V5E, False, id="v5e-dense", marks=pytest.mark.slow),
        pytest.param(None, True, id="v6e-int4", marks=pytest.mark.slow),
    ],
)
def test_no_race_and_nothing_read_out_of_bounds_or_uninitialised(chip, int4, monkeypatch):
    if chip:
        on(chip, monkeypatch)
    shape = shapes.AWKWARD[2]
    given = arguments(shape, jnp.bfloat16, int4)
    careful = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    try:
        arrays = *given[:3], *(as_weight("mixture", "", weight) for weight in given[3:])
        found = KERNEL.mixture(*arrays, jnp.int32(0), activation=silu_gated, interpret=careful)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert relative_rmse(found, reference.mixture(*given)) <= 4e-3


@pytest.mark.parametrize(("implementation", "int4"), [("xla", True), ("xla", False), ("mosaic_tpu", True)])
def test_gradient(implementation, int4):
    # Given a mixture, and in float64 a small change of x and of one weight
    shape = shapes.MixtureShape("", 3, 2, 128, 128, 4, 1, 2)
    x, chosen, weights, *matrices = arguments(shape, jnp.float32, int4=int4)
    cotangent = np.random.default_rng(1).normal(size=x.shape)

    def loss(x, weights):
        out = mixture(x, chosen, weights, *matrices, first=1, implementation=implementation)
        return jnp.sum(out * jnp.asarray(cotangent, jnp.float32))

    dx, dweights = jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    def moved(step, x_step, weight_step):
        new = np.asarray(x, np.float64) + step * x_step, np.asarray(weights, np.float64) + step * weight_step
        return np.sum(cotangent * reference.mixture(new[0], chosen, new[1], *matrices, 1))

    rng = np.random.default_rng(2)
    for _ in range(3):
        along = rng.normal(size=x.shape), rng.normal(size=weights.shape)
        slope = (moved(1e-5, *along) - moved(-1e-5, *along)) / 2e-5
        np.testing.assert_allclose(np.sum(dx * along[0]) + np.sum(dweights * along[1]), slope, rtol=2e-4)


BF16, F32, INT32, INT4 = jnp.bfloat16, jnp.float32, jnp.int32, jnp.int4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": jnp.zeros((4, 2), F32)}, "mixture: chosen is float32, expected int32"),
        ({"chosen": jnp.zeros((5, 2), INT32)}, "mixture: chosen has shape (5, 2), expected [T=4, J]"),
        ({"weights": jnp.zeros((4, 3), F32)}, "mixture: weights has shape (4, 3), expected [T=4, J=2]"),
        ({"up": jnp.zeros((3, 256, 128), BF16)}, "mixture: up has shape (3, 256, 128), expected [3, 128, 128]"),
        ({"down": jnp.zeros((3, 128, 128), F32)}, "mixture: down is float32, expected bfloat16"),
        (
            {"down": Int4(jnp.zeros((3, 128, 128), INT4), jnp.zeros((3, 4, 128), BF16))},
            "mixture: gate, up and down are Dense, Dense, Int4, expected one format",
        ),
        (
            {"chosen": jnp.asarray([[0, 1], [2, 1], [2, 2], [-1, -1]], INT32)},
            "mixture: token 2 has chosen experts [2, 2], expected each of them once",
        ),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {
        "x": jnp.zeros((4, 128), BF16),
        "chosen": jnp.asarray([[0, 1], [1, 2], [2, 0], [-1, -1]], INT32),
        "weights": jnp.zeros((4, 2), F32),
        "gate": jnp.zeros((3, 128, 128), BF16),
        "up": jnp.zeros((3, 128, 128), BF16),
        "down": jnp.zeros((3, 128, 128), BF16),
    }
    assert mixture(**good).shape == (4, 128)
    with pytest.raises(ValueError) as raised:
        mixture(**good | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("tokens", "inputs", "dtype", "reason"),
    [
        (513, 128, BF16, "x is [513, 128], expected at most [512, 8192] and 4,194,304 numbers"),
        (4, 96, BF16, "weights are [128, 96], expected multiples of 128"),
        (4, 128, jnp.float16, "x is float16, expected bfloat16 or float32"),
        (0, 128, BF16, "x has no rows"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_when_asked_for(tokens, inputs, dtype, reason):
    shape = shapes.MixtureShape("", tokens, 2, inputs, 128, 4, 0, 4)
    given = (
        arguments(shape, dtype, int4=False)
        if tokens
        else (
            jnp.zeros((0, inputs), dtype),
            jnp.zeros((0, 2), INT32),
            jnp.zeros((0, 2), F32),
            *experts(np.random.default_rng(0), shape, dtype, False),
        )
    )
    with pytest.raises(ValueError) as raised:
        mixture(*given, implementation="mosaic_tpu")
    assert str(raised.value) == f"mixture: the mosaic_tpu kernel cannot serve this call: {reason}"
    assert mixture(*given).shape == (tokens, inputs)
