"""Every op at every listed shape lowers for CUDA on a host without a GPU, and without any TPU kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as ops
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.kda import shapes as kda
from pallas_kernels.matmul import shapes as int4
from pallas_kernels.mixture import shapes as mixtures
from pallas_kernels.mla_attention import shapes as mla

INT4, INT32, BF16, F32 = (
    partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int4, jnp.int32, jnp.bfloat16, jnp.float32)
)
H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))


def int4_matmul(shape):
    return ops.int4_matmul, (BF16((shape.M, shape.K)), *int4_weight(shape))


def int4_weight(shape, *lead):
    return INT4((*lead, shape.K, shape.N)), BF16((*lead, shape.K // 32, shape.N))


def of_groups(op, shape, *weights):
    groups = len(shape.sizes)
    return op, (BF16((sum(shape.sizes) + shape.spare, shape.K)), *weights, INT32((groups,)))


def int4_grouped_matmul(shape):
    return of_groups(ops.int4_grouped_matmul, shape, *int4_weight(shape, len(shape.sizes)))


def int4_grouped_glu(shape):
    weight = ops.Int4(*int4_weight(shape, len(shape.sizes)))
    return of_groups(ops.grouped_glu, shape, weight, weight)


def grouped_matmul(shape):
    return of_groups(ops.grouped_matmul, shape, BF16((len(shape.sizes), shape.N, shape.K)))


def grouped_glu(shape):
    weight = BF16((len(shape.sizes), shape.N, shape.K))
    return of_groups(ops.grouped_glu, shape, weight, weight)


def mixture(shape):
    into, out_of = BF16((shape.num_local, shape.N, shape.K)), BF16((shape.num_local, shape.K, shape.N))
    tokens = INT32((shape.T, shape.J)), F32((shape.T, shape.J))
    return ops.mixture, (BF16((shape.T, shape.K)), *tokens, into, into, out_of)


def int4_mixture(shape):
    def codes(in_, out):
        return ops.Int4(INT4((shape.num_local, in_, out)), BF16((shape.num_local, in_ // 32, out)))

    op, (x, chosen, weights, *_) = mixture(shape)
    into, out_of = codes(shape.K, shape.N), codes(shape.N, shape.K)
    return op, (x, chosen, weights, into, into, out_of)


def kda_row(shape):
    keys, values = (BF16((shape.B, shape.T, shape.H, width)) for width in (shape.Dk, shape.Dv))
    return ops.kda, (keys, keys, values, F32(keys.shape), BF16(keys.shape[:3]))


def kda_gradient(shape):
    def gradient(*arrays, implementation):
        return jax.grad(lambda *arrays: jnp.sum(ops.kda(*arrays, implementation=implementation)[0]))(*arrays)

    return gradient, kda_row(shape)[1]


def kda_step(shape):
    keys, values = (BF16((shape.B, shape.H, width)) for width in (shape.Dk, shape.Dv))
    return ops.kda_step, (keys, keys, values, F32(keys.shape), BF16(keys.shape[:2]), F32(tuple(shape)))


def mla_prefill(shape):
    def prefill(q, k, v, q_positions, kv_positions, implementation):
        positions = {"q_positions": q_positions, "kv_positions": kv_positions}
        return ops.mla_prefill(q, k, v, **positions, scale=1.0, implementation=implementation)

    queries, keys = (shape.B, shape.S), (shape.B, shape.T)
    q, k, v = BF16((*queries, shape.H, shape.D)), BF16((*keys, shape.H, shape.D)), BF16((*keys, shape.H, shape.Dv))
    return prefill, (q, k, v, INT32(queries), INT32(keys))


def paged(shape):
    rows, pages = len(shape.lengths), -(-max(shape.lengths) // shape.page)
    return BF16((rows * pages, shape.latent + shape.rope, shape.page)), INT32((rows, pages)), INT32((rows,))


def mla_decode(shape):
    cache, table, lengths = paged(shape)
    q = BF16((lengths.shape[0], shape.H, shape.latent + shape.rope))
    return partial(ops.mla_decode, latent=shape.latent, scale=1.0), (q, cache, table, lengths)


def mla_write(shape):
    cache, table, positions = paged(shape)
    return ops.mla_write, (cache, BF16((table.shape[0], cache.shape[1])), table, positions)


CASES = [
    *[(int4_matmul, shape) for shape in int4.KIMI + int4.AWKWARD],
    *[(op, shape) for op in (int4_grouped_matmul, int4_grouped_glu) for shape in grouped.KIMI + grouped.AWKWARD],
    *[(op, shape) for op in (grouped_matmul, grouped_glu) for shape in grouped.KIMI + grouped.AWKWARD],
    *[(op, shape) for op in (mixture, int4_mixture) for shape in mixtures.KIMI + mixtures.AWKWARD],
    *[(kda_row, shape) for shape in kda.KIMI + kda.AWKWARD],
    (kda_gradient, kda.KIMI[0]),
    *[(kda_step, shape) for shape in kda.STEP],
    *[(mla_prefill, shape) for shape in mla.PREFILL],
    *[(op, shape) for op in (mla_decode, mla_write) for shape in mla.DECODE],
]


@pytest.mark.parametrize("op,shape", CASES, ids=lambda part: getattr(part, "__name__", None) or str(part))
def test_lowers_for_cuda(op, shape):
    function, arguments = op(shape)
    choices = [{}] if op is mla_write else [{"implementation": None}]
    if op is not mla_write and (op, shape) == next(case for case in CASES if case[0] is op):
        choices.append({"implementation": "xla"})  # one shape of each op is enough: it is what None chooses
    for choice in choices:
        # A new function each time: jit would return the trace of the other choice
        jitted = jax.jit(lambda *arrays, choice=choice: function(*arrays, **choice))
        with use_abstract_mesh(H100):  # JAX 0.12 asks for it where there is no GPU
            text = jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert "func.func public @main" in text and "tpu_custom_call" not in text


def test_a_tpu_kernel_would_be_seen():
    function, arguments = kda_step(kda.STEP[0])
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
