"""The backend that runs, and the refusal of bad arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.checks import bind_shapes, check_dtype
from pallas_kernels.dispatch import Backend, choose, shapes_only
from pallas_kernels.hardware import MIB, chip


def kernel(x, interpret):
    return x * (jnp.e if interpret else jnp.pi)


def refuse_odd(x):
    return f"K is {x.shape[0]}, expected an even number" if x.shape[0] % 2 else None


PLAIN = Backend("xla", jnp.sin)
BOTH = (Backend("mosaic_tpu", kernel, ("tpu",), refuse_odd), PLAIN)


def doubled(x, interpret):
    return x + x


def call(x, implementation=None, backends=BOTH):
    return choose("op", implementation, backends, x)(x)


def lowered(function, *arrays, platforms):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()


def operations(backends, size, platforms=("tpu", "cuda", "rocm", "cpu"), implementation=None):
    """Returns, for each platform, the operation that `kernel`, `doubled` or `PLAIN` lowers to."""
    texts = [
        lowered(partial(call, implementation=implementation, backends=backends), jnp.ones(size), platforms=(platform,))
        for platform in platforms
    ]
    return [[name for name in ("multiply", "add", "sine") if f"stablehlo.{name}" in text] for text in texts]


def test_layers_that_call_a_kernel_alike_share_it():
    # Given layers that each bind the options of their own call
    def model(x, scales):
        for scale in scales:
            x = call(x, backends=(Backend("mosaic_tpu", partial(scaled, scale=scale), ("tpu",)), PLAIN))
        return x

    def kernels(*scales):
        text = lowered(lambda x: model(x, scales), jnp.ones(3), platforms=("tpu",))
        return text.count("stablehlo.multiply"), text.count("call @scaled")

    # Then one function serves all calls with equal options, and another serves the rest
    assert kernels(2.0, 2.0, 2.0) == (1, 3)
    assert kernels(2.0, 3.0, 2.0) == (2, 3)


def scaled(x, scale, interpret):
    return scale * x


def test_chips_do_not_share_a_kernel():
    def lowered_on(kind):
        mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "tpu"))
        backends = (Backend("mosaic_tpu", times_vmem, ("tpu",)), PLAIN)
        with jax.sharding.use_abstract_mesh(mesh):
            return lowered(partial(call, backends=backends), jnp.ones(3), platforms=("tpu",))

    for _ in range(2):
        assert "6.400000e+01" in lowered_on("TPU7x") and "1.280000e+02" in lowered_on("TPU v6 lite")


def times_vmem(x, interpret):
    return x * (chip().vmem / MIB)


def test_a_kernel_made_for_one_call_is_not_kept():
    for factor in (2.0, 3.0):
        backends = (Backend("mosaic_tpu", lambda x, interpret, factor=factor: factor * x, ("tpu",)), PLAIN)
        assert f"{factor:.6e}" in lowered(partial(call, backends=backends), jnp.ones(3), platforms=("tpu",))


def test_none_is_settled_by_the_platform_lowered_for():
    assert operations(BOTH, 4) == [["multiply"], ["sine"], ["sine"], ["sine"]]
    np.testing.assert_allclose(jax.jit(call)(jnp.ones(4)), np.sin(1), rtol=1e-6)
    # One text for two platforms has both
    assert "multiply" in (text := lowered(call, jnp.ones(4), platforms=("tpu", "cuda"))) and "sine" in text


def test_the_kernel_asked_for_is_compiled_on_its_platform_and_interpreted_elsewhere():
    asked = partial(call, implementation="mosaic_tpu")
    np.testing.assert_allclose(jax.jit(asked)(jnp.ones(4)), np.e, rtol=1e-6)
    assert "3.14" in lowered(asked, jnp.ones(4), platforms=("tpu",))
    assert "2.71" in lowered(asked, jnp.ones(4), platforms=("cuda",))


def test_a_backend_that_refuses_leaves_the_call_to_the_next_or_raises_when_asked_for():
    assert operations(BOTH, 3) == [["sine"]] * 4
    with pytest.raises(ValueError, match="op: the mosaic_tpu kernel cannot serve this call: K is 3, expected an even"):
        choose("op", "mosaic_tpu", BOTH, jnp.ones(3))


def test_a_gpu_backend_is_one_more_entry():
    # Given a backend for both kinds of GPU, in front of those that there are
    gpu = Backend("gpu", doubled, ("cuda", "rocm"), lambda x: "x is long" if x.shape[0] > 4 else None)
    three = (gpu, *BOTH)

    # Then it serves GPUs, other platforms keep theirs, and a call that it refuses goes on as before
    assert operations(three, 4) == [["multiply"], ["add"], ["add"], ["sine"]]
    assert operations(three, 3) == [["sine"], ["add"], ["add"], ["sine"]]
    assert operations(three, 6) == operations(BOTH, 6)
    assert operations(three, 4, implementation="gpu") == [["add"]] * 4
    with pytest.raises(ValueError, match="op: the gpu kernel cannot serve this call: x is long"):
        call(jnp.ones(6), "gpu", three)


def test_the_first_in_order_is_taken():
    # Given two kernels for one platform, and one behind a backend that serves every platform
    faster = Backend("faster", doubled, ("tpu",), lambda x: "x is long" if x.shape[0] > 4 else None)
    assert operations((faster, *BOTH), 4, ("tpu",)) == [["add"]]
    assert operations((faster, *BOTH), 6, ("tpu",)) == [["multiply"]]
    assert operations((*BOTH, faster), 3, ("tpu",)) == [["sine"]]


def test_a_call_that_all_refuse_names_their_reasons():
    backends = (BOTH[0], Backend("xla", jnp.sin, refuse=lambda x: "x is old"))
    expected = "op: no implementation can serve this call: mosaic_tpu: K is 3, expected an even number; xla: x is old"
    with pytest.raises(ValueError, match=expected):
        call(jnp.ones(3), backends=backends)
    # One that is left serves its own platform only
    assert operations(backends, 4, ("tpu",)) == [["multiply"]]
    with pytest.raises(NotImplementedError, match="cuda"):
        operations(backends, 4, ("cuda",))


def test_an_implementation_that_is_not_there_is_refused():
    assert choose("op", "xla", [Backend("xla", abs)], -2)(-2) == 2
    for asked in ("mosaic_tpu", "triton"):
        with pytest.raises(ValueError, match=rf"kda: implementation '{asked}' is not available.*\['xla'\]"):
            choose("kda", asked, [Backend("xla", abs)], -2)


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


def test_shapes_alone():
    # Given a traced function
    stepped = jax.jit(call)
    x = jnp.ones(4)
    expected = np.asarray(stepped(x))

    # Then its shapes can be traced without what it computes, which neither replaces the function nor stays in force
    with shapes_only(True):
        primitives = {equation.primitive.name for equation in stepped.trace(x).jaxpr.eqns}
        np.testing.assert_array_equal(call(x), np.zeros(4))
    assert primitives <= {"broadcast_in_dim"}
    np.testing.assert_array_equal(stepped(x), expected)
    np.testing.assert_array_equal(jax.jit(call)(x), expected)
