"""A training step of K2.5 at full width, compiled for TPU slices that are not here: minutes each (`make slow`)."""

import pytest

from kimi_jax import config_json, plan
from kimi_jax.plan.train_job import TrainJob, counted
from kimi_jax.plan.train_plan import Measured, choose_sizes, measure
from kimi_jax.plan.train_traffic import summed
from sharding.topologies import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not plan.available(), reason="libtpu, the TPU compiler, is not installed"),
]
K25 = config_json.preset("kimi-k2.5")


def numbers(measured: Measured, kind: str) -> dict:
    return {(one.axes, one.in_loop): (one.count, one.nbytes) for one in measured.messages if one.kind == kind}


@pytest.mark.parametrize("slice_", ["v5p:4x8x8", "tpu7x:4x4x8"])
def test_a_step_of_k25_at_full_width(slice_):
    # Given the dense layer and one with experts, a row of 4,096 tokens for each of 256 devices
    job = TrainJob(K25, topology(slice_), (), 256, 4096)
    sizes = choose_sizes(job)
    assert sizes == (128, 1, 1, 2)
    short = TrainJob(K25, topology(slice_), sizes, 256, 4096).with_layers(1, ("mla",))
    made = plan.compiled(short)
    compiled, traced = Measured(summed(made.collectives), None, None), measure(short, None)[0]

    # Then no expert is gathered, moved or sent: over `data` goes each matrix but theirs in bf16, those of layers twice
    assert {one.how for one in made.moved} <= {"copy"}
    partition, count, nbytes, states = short.partition, 0, 0, 0
    for one, number in counted(short.config):
        spec = partition.spec(one.axes, one.shape)
        local = number * partition.local_size(one.shape, spec)
        passes = 0 if one.kind == "experts" or "data" not in str(spec) else 1 if one.kind == "embeddings" else 2
        count, nbytes = count + passes * number, nbytes + 2 * passes * local
        states += local * (12 if one.kind == "embeddings" else 8)  # AdamW's second moment
    assert numbers(compiled, "all-gather")[("data",), False] == (count, nbytes)
    assert made.arguments == pytest.approx(states, rel=2e-3)
    # and rows travel in blocks of equal size, as in a trace: five times, and their experts' numbers and weights
    rows = (("sequence",), True)
    assert numbers(compiled, "all-gather")[rows] == numbers(traced, "all-gather")[rows]
    assert numbers(compiled, "all-to-all") == numbers(traced, "all-to-all")
    assert numbers(compiled, "all-to-all")[("data",), True][0] == 9
