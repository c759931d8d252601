"""Which implementation runs, and how bad arguments are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks import bind_shapes, check_dtype
from pallas_kernels.dispatch import choose

BOTH = {"xla": lambda x: x + 1, "mosaic_tpu": lambda x: x * jnp.pi}


def test_none_is_settled_by_the_platform_lowered_for():
    run = jax.jit(lambda x: choose("op", None, BOTH)(x))
    traced = run.trace(jnp.ones(3))
    assert "multiply" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "add" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "multiply" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    np.testing.assert_array_equal(run(jnp.ones(3)), 2.0)


def test_an_explicit_implementation_runs_or_is_refused():
    np.testing.assert_allclose(choose("op", "mosaic_tpu", BOTH)(1.0), np.pi)
    assert choose("op", "xla", {"xla": abs})(-2) == 2
    with pytest.raises(ValueError, match=r"kda: implementation 'mosaic_tpu' is not available.*\['xla'\]"):
        choose("kda", "mosaic_tpu", {"xla": abs})


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
