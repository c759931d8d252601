"""The choice of an implementation, and the refusal of bad arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.checks import bind_shapes, check_dtype
from pallas_kernels.chip import chip
from pallas_kernels.dispatch import choose


def kernel(x, interpret):
    return x * (jnp.e if interpret else jnp.pi)


BOTH = {"xla": lambda x: x + 1, "mosaic_tpu": kernel}


def scaled(x, scale, interpret):
    return scale * x


def test_layers_that_call_a_kernel_alike_share_it():
    # Given layers that each bind the options of their own call
    def model(x, scales):
        for scale in scales:
            x = choose("op", None, {"xla": jnp.sin, "mosaic_tpu": partial(scaled, scale=scale)})(x)
        return x

    def kernels(*scales):
        text = jax.jit(lambda x: model(x, scales)).trace(jnp.ones(3)).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("stablehlo.multiply"), text.count("call @scaled")

    # Then one function serves all calls with equal options, and another serves the rest
    assert kernels(2.0, 2.0, 2.0) == (1, 3)
    assert kernels(2.0, 3.0, 2.0) == (2, 3)


def test_chips_do_not_share_a_kernel():
    def lowered(kind):
        mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "tpu"))
        with jax.sharding.use_abstract_mesh(mesh):
            run = jax.jit(lambda x: choose("op", None, {"xla": jnp.sin, "mosaic_tpu": wide_as_the_mxu})(x))
            return run.trace(jnp.ones(3)).lower(lowering_platforms=("tpu",)).as_text()

    for _ in range(2):
        assert "1.280000e+02" in lowered("TPU v5 lite") and "2.560000e+02" in lowered("TPU v6 lite")


def wide_as_the_mxu(x, interpret):
    return x * float(chip().mxu)


def test_a_kernel_made_for_one_call_is_not_kept():
    def run(x, factor):
        return choose("op", None, {"xla": jnp.sin, "mosaic_tpu": lambda x, interpret: factor * x})(x)

    for factor in (2.0, 3.0):
        text = jax.jit(run, static_argnums=1).trace(jnp.ones(3), factor).lower(lowering_platforms=("tpu",)).as_text()
        assert f"{factor:.6e}" in text


def test_none_is_settled_by_the_platform_lowered_for():
    run = jax.jit(lambda x: choose("op", None, BOTH)(x))
    traced = run.trace(jnp.ones(3))
    assert "multiply" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "add" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "multiply" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    np.testing.assert_array_equal(run(jnp.ones(3)), 2.0)


def test_the_kernel_asked_for_is_mosaic_on_tpu_and_interpreted_elsewhere():
    run = jax.jit(lambda x: choose("op", "mosaic_tpu", BOTH)(x))
    np.testing.assert_allclose(run(jnp.ones(3)), np.e, rtol=1e-6)
    assert "3.14" in run.trace(jnp.ones(3)).lower(lowering_platforms=("tpu",)).as_text()


def test_a_call_that_the_kernel_cannot_serve_falls_to_xla_or_raises_when_asked_for():
    assert choose("op", None, BOTH, unsupported="K is odd")(1.0) == 2.0
    with pytest.raises(ValueError, match="op: the mosaic_tpu kernel cannot serve this call: K is odd"):
        choose("op", "mosaic_tpu", BOTH, unsupported="K is odd")


def test_an_implementation_that_is_not_there_is_refused():
    assert choose("op", "xla", {"xla": abs})(-2) == 2
    for asked in ("mosaic_tpu", "triton"):
        with pytest.raises(ValueError, match=rf"kda: implementation '{asked}' is not available.*\['xla'\]"):
            choose("kda", asked, {"xla": abs})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", (False, 128)),
        ("TPU v5", (False, 128)),
        ("TPU v6 lite", (True, 256)),
        ("TPU7x", (True, 256)),
        ("cpu", (True, 256)),
    ],
)
def test_the_chip_is_the_one_traced_for(kind, expected):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert chip()[:2] == expected


def test_shapes_are_bound_across_arguments():
    assert bind_shapes("op", x=(np.zeros((2, 3)), "M K"), w=(np.zeros((3, 5)), "K N")) == {"M": 2, "K": 3, "N": 5}
    with pytest.raises(ValueError, match=r"op: w has shape \(4, 5\), expected \[K=3, N\]"):
        bind_shapes("op", x=(np.zeros((2, 3)), "M K"), w=(np.zeros((4, 5)), "K N"))
    with pytest.raises(ValueError, match=r"op: x has shape \(2,\), expected \[M, K\]"):
        bind_shapes("op", x=(np.zeros(2), "M K"))
    with pytest.raises(ValueError, match=r"op: x has shape \(2, 3\), expected \[2, 7\]"):
        bind_shapes("op", x=(np.zeros((2, 3)), "2 7"))
    with pytest.raises(ValueError, match="agree"):
        bind_shapes("op", x=(np.zeros((2, 3)), "M M"))


def test_dtypes_are_refused_by_name():
    check_dtype("op", "x", jnp.zeros(1, jnp.bfloat16), jnp.floating)
    with pytest.raises(ValueError, match="op: x is int32, expected floating"):
        check_dtype("op", "x", jnp.zeros(1, jnp.int32), jnp.floating)
    with pytest.raises(ValueError, match="op: g is bfloat16, expected float32 or float64"):
        check_dtype("op", "g", jnp.zeros(1, jnp.bfloat16), jnp.float32, jnp.float64)
