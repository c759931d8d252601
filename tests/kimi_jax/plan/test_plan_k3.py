"""Kimi K3's plans: its bytes on a slice by closed forms, and the messages of its decode step."""

import pytest

from kimi_jax import config_json, plan
from kimi_jax.plan import analytic
from kimi_jax.plan.messages import messages
from sharding import mesh_sizes
from sharding.topologies import topology

K3 = config_json.preset("kimi-k3")
IN_SEQUENCE = "expert=2,tensor=8,sequence=4"  # 96 heads divide by no 64


def job(mesh: str, batch: int = 32, context: int = 8192) -> plan.Job:
    return plan.Job(K3, topology("v5p:4x4x4"), mesh_sizes(mesh), "decode", batch, context)


def test_every_weight_is_counted_once() -> None:
    memory = analytic.memory(job("data=8,tensor=8"))
    # a byte for two codes and one for the exponent of 32 of them
    assert memory.experts == 92 * 896 * 3 * 3072 * 3584 * 17 // 32 // 64
    # a device has 12 of 96 heads, and whole low-rank projections and norms
    kda = 2 * (5 * 12288 * 7168 + 12288 * 128 + 96 * 7168) + 4 * (3 * 4 * 12288 + 12288 + 96)
    mla = 18432 * 1536 + 24576 * 512 + 2 * 12288 * 7168 + 1536 * 7168 + 576 * 7168
    small = 69 * (2 * 128 * 7168 + 4 * 128) + 24 * 2 * (1536 + 512)
    assert memory.attention == (69 * kda + 24 * 2 * mla) // 8 + small
    shared, dense = 3 * 7168 * 6144 // 64, 3 * 7168 * 33792 // 8
    # every device has the latent experts' projections, the router, and all norms whole
    whole = 92 * (2 * 3584 * 7168 + 3584 + 896 * 7168) + (2 * 93 + 1) * 7168 + (93 * 4 + 2) * 7168
    assert memory.other_weights == 2 * (92 * shared + dense + whole) + 92 * 896 * 4


@pytest.mark.parametrize(("context", "batch"), [(8192, 32), (1_048_576, 1)])
def test_the_cache_is_that_of_the_layers_that_have_one(context: int, batch: int) -> None:
    # Attention residuals have none
    memory = analytic.memory(job(IN_SEQUENCE, batch, context))
    states, tails = 69 * 96 * 128 * 128 * 4, 69 * 3 * 3 * 12288 * 2
    assert states == 434_110_464 and 24 * 576 * 2 == 27_648
    assert memory.cache == batch * (context * 27_648 // 4 + (states + tails) // 8)


@pytest.mark.parametrize(
    ("mesh", "of_kda", "of_mla"), [("data=64", 1, 1), ("data=8,tensor=8", 1, 2), (IN_SEQUENCE, 1, 4)]
)
def test_a_decode_step_sends_as_many_messages_as_k25s(mesh: str, of_kda: int, of_mla: int) -> None:
    sent = messages(job(mesh, 64))
    # and one for the mixture or the dense layer, and one for the embeddings
    assert sum(one.count for one in sent) == 69 * of_kda + 24 * of_mla + 93 + 1
    # both sums of a mixture in one message: 3,584 and 7,168 float32 numbers a token
    assert any(one.nbytes == 64 * (3584 + 7168) * 4 and one.count == 92 for one in sent)
