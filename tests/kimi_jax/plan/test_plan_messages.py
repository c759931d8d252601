"""Messages that the planner reads off traces, beside those of the same step compiled for eight devices of this host."""

import dataclasses
import json
from collections import Counter

import pytest

from checkpoints.toy import head_config, toy_config
from kimi_jax import config_json, plan
from kimi_jax.model.kimi import abstract
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.job import Drafting
from kimi_jax.plan.messages import messages, trace
from kimi_jax.plan.traffic import collectives
from kimi_jax.runtime.program import Program
from sharding import make_mesh, mesh_sizes
from sharding.topologies import topology

MESH = "data=2,tensor=2,sequence=2"
K25 = config_json.preset("kimi-k2.5")
# XLA computes once what all layers alike ask of the other devices: the longest row, and numbers of shards.
SMALL = 16


def toy_job(folder, phase, chunk, **changes):
    # float32, since XLA sends bfloat16 as float32 between CPUs
    (folder / "config.json").write_text(json.dumps(toy_config("k2", dtype="float32", **changes)))
    config = config_json.from_folder(folder)
    return plan.Job(config, topology("v5e:2x4"), mesh_sizes(MESH), phase, 8, max(256, chunk), chunk)


def times_sent(found):
    """Counts messages by kind, axes and bytes, those within loops once."""
    counted = Counter()
    for one in found:
        if one.nbytes > SMALL:
            counted[one.kind, one.axes, one.group, one.nbytes] += one.count
    return counted


@pytest.mark.parametrize(
    ("phase", "chunk", "changes", "kinds"),
    [
        ("decode", 1, {"num_hidden_layers": 3}, {"all-reduce", "all-gather", "all-to-all"}),
        pytest.param(
            "prefill",
            64,
            {"num_hidden_layers": 2},
            {"all-reduce", "all-gather", "reduce-scatter"},
            marks=pytest.mark.slow,
        ),
        # enough bytes for tokens to travel to their experts
        (
            "prefill",
            4096,
            {"num_hidden_layers": 2, "hidden_size": 1024},
            {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"},
        ),
    ],
    ids=["decode", "prefill", "token exchange"],
)
def test_a_compiled_step_has_the_messages_of_its_trace(tmp_path, phase, chunk, changes, kinds):
    job = toy_job(tmp_path, phase, chunk, **changes)
    assert job.layout.dispatches is (chunk == 4096)
    program = Program(abstract(job.config, mesh=make_mesh(MESH)))
    compiled = collectives(parse(trace(program, job).lower().compile().as_text()), job.mesh)
    traced = messages(job, platform="cpu")
    assert times_sent(traced) == times_sent(compiled)
    assert {one.kind for one in traced} == kinds


def test_prefill_exchanges_tokens_on_a_tpu():
    job = plan.Job(K25, topology("v6e:8x8"), mesh_sizes("data=32,tensor=2"), "prefill", 64, 8192, 2048)
    back, there = [one for one in messages(job) if one.kind == "ragged-all-to-all"]
    # each of 60 mixtures sends a device's 2,048 tokens to at most eight devices in bf16, and gets float32 sums
    assert (there.nbytes, there.count) == (2048 * 8 * 7168 * 2, 60)
    assert (back.nbytes, back.count) == (2048 * 8 * 7168 * 4, 60)
    assert all(one.axes == ("data", "tensor") for one in (there, back))
    # no message has the sums of all tokens any more
    assert max(one.nbytes for one in messages(job)) == back.nbytes


def test_queries_are_sent_whole_to_every_device():
    # among 64 devices a TPU gathers them by ragged messages of one row: those of 64 rows and one head, to 63 devices
    job = plan.Job(K25, topology("v6e:8x8"), mesh_sizes("sequence=64"), "decode", 64, 8192)
    (queries,) = [one for one in messages(job) if one.kind == "ragged-all-to-all"]
    assert (queries.nbytes, queries.count, queries.to_all) == (64 * 576 * 2, 61, True)
    assert queries.sent == 61 * 63 * 64 * 576 * 2


@pytest.mark.parametrize("drafts", [1, 3])
def test_each_draft_sends_three_sums(tmp_path, drafts):
    # Given a head, whose embeddings, attention and MLP are each summed over the devices of a row
    job = toy_job(tmp_path, "decode", 1 + drafts, num_hidden_layers=3)
    head = config_json.eagle_from_dict(head_config(json.loads((tmp_path / "config.json").read_text()), "eagle3-mla"))
    sums = {}
    for draft in (Drafting(drafts), Drafting(drafts, config_json.fit_target(head, job.config))):
        found = messages(dataclasses.replace(job, draft=draft))
        sums[draft.head] = sum(one.count for one in found if one.kind == "all-reduce" and one.nbytes > SMALL)
    assert sums[head] - sums[None] == 3 * drafts


def test_one_device_sends_nothing():
    assert messages(plan.Job(K25, topology("v6e:2x2"), (1, 1, 1, 1), "decode", 1, 128)) == ()


def test_heads_that_a_mesh_does_not_divide_are_refused():
    # though the matrices of 64 heads divide by 512
    job = plan.Job(K25, topology("tpu7x:4x8x8"), mesh_sizes("sequence=512"), "decode", 1, 8192)
    with pytest.raises(ValueError, match="axis 'heads' of 64 does not divide by mesh axis 'sequence' of 512"):
        plan.plan("K2.5", job, sizes=job.sizes)
