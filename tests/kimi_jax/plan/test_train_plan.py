"""Plans of training: states against the published sizes, messages of traces, and what is refused."""

import dataclasses
import json

import pytest

from checkpoints.toy import toy_config
from kimi_jax import config_json
from kimi_jax.cli import main
from kimi_jax.plan.compile import Compiled
from kimi_jax.plan.messages import traced
from kimi_jax.plan.traffic import Collective
from kimi_jax.plan.train_bound import bound, mean_distance
from kimi_jax.plan.train_job import (
    FORMS,
    TrainJob,
    active_parameters,
    layers_with_experts,
    num_parameters,
    smallest_slice,
    state_bytes,
)
from kimi_jax.plan.train_plan import choose_sizes, local_states, train_plan
from kimi_jax.plan.train_step import trace
from kimi_jax.plan.train_traffic import Messages, summed
from pallas_kernels.hardware import CHIPS
from sharding import expert_dispatch
from sharding.topologies import topology

K25, LINEAR = config_json.preset("kimi-k2.5"), config_json.preset("kimi-linear-48b")
TOY_JSON = toy_config(
    "k2", hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=8,
    num_key_value_heads=8, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16,
    num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
)  # fmt: skip
TOY = config_json.from_dict(TOY_JSON)


def test_k25_has_a_trillion_parameters():
    assert num_parameters(K25) == pytest.approx(1.026879e12, rel=1e-6)
    assert num_parameters(K25, "experts") == 60 * 384 * 3 * 7168 * 2048 == pytest.approx(1.014686e12, rel=1e-6)
    assert active_parameters(K25) == pytest.approx(32e9, rel=0.02)
    assert layers_with_experts(LINEAR)[1] == {"kda": 19, "mla": 7}


@pytest.mark.parametrize(
    ("form", "terabytes", "gigabytes", "v6e", "v5p", "tpu7x"),
    [
        (FORMS[0], 6.16, (96, 48, 24, 12), "v6e:16x16", "v5p:4x4x8", "tpu7x:4x4x4"),
        (FORMS[1], 8.2, (128, 64, 32, 16), None, "v5p:4x4x8", "tpu7x:4x4x4"),
        (FORMS[2], 10.3, (160, 80, 40, 20), None, "v5p:4x8x8", "tpu7x:4x4x8"),
        (FORMS[3], 14.4, (225, 112, 56, 28), None, "v5p:4x8x8", "tpu7x:4x4x8"),
    ],
)
def test_the_slices_that_hold_k25(form, terabytes, gigabytes, v6e, v5p, tpu7x):
    assert state_bytes(K25, form) / 1e12 == pytest.approx(terabytes, rel=0.005)
    for chips, expected in zip((64, 128, 256, 512), gigabytes, strict=True):
        assert state_bytes(K25, form, chips) / 1e9 == pytest.approx(expected, abs=0.6)
    found = {chip: smallest_slice(K25, form, chip) for chip in CHIPS}
    assert {chip: None if one is None else one.name for chip, one in found.items()} == {
        "v5e": None, "v6e": v6e, "v5p": v5p, "tpu7x": tpu7x
    }  # fmt: skip


@pytest.mark.parametrize(("slice_", "distance"), [("v5p:4x8x8", 5.0), ("tpu7x:4x4x8", 4.0), ("v6e:8x8", 4.0)])
def test_a_message_to_any_chip_passes_several_links(slice_, distance):
    assert mean_distance(topology(slice_)) == distance


@pytest.mark.parametrize(("slice_", "by"), [("v5p:4x8x8", "FLOPs"), ("tpu7x:4x4x8", "links")])
def test_bounds_of_a_step_of_k25(slice_, by):
    job = TrainJob(K25, topology(slice_), (128, 1, 1, 2), 256, 4096)
    assert choose_sizes(job) == job.sizes
    # an even share of 10 bytes for each parameter, and of what cannot be shared no more than a hundredth
    assert 1 <= local_states(job) / (state_bytes(K25, FORMS[2], 256) * (1 - 0.5e-3)) <= 1.01
    rows = 128 * 320  # of the 4,096 x 8 pairs of a device's tokens with their experts, and a quarter more
    sent = Messages("all-to-all", ("data",), 128, True, 5 * 60, 5 * 60 * rows * 7168 * 2)
    found = bound(job, [sent])
    assert found.model_flops == pytest.approx(6 * 31.687e9 * 4096, rel=1e-3)
    assert found.optimizer_flops == pytest.approx(0.14 * found.flops, rel=0.1)
    assert found.hop_bytes == found.sent_bytes * mean_distance(job.topology)
    assert found.bound_by == by and 0.4 <= found.mfu <= 0.7


@pytest.fixture
def many_tokens(monkeypatch):
    """Lets tokens travel to their experts, which pays for large widths alone."""
    monkeypatch.setattr(expert_dispatch, "MIN_BYTES_SAVED", -1e9)


@pytest.mark.slow
def test_a_plan_extrapolates_what_the_whole_step_sends(many_tokens):
    job = TrainJob(TOY, topology("v5e:2x4"), (4, 1, 1, 2), 8, 64)
    plan = train_plan("toy", job)
    whole = summed(traced(trace(job, job.partition.mesh).jaxpr.jaxpr, job.mesh))
    counts = {(one.kind, one.axes, one.in_loop): (one.count, one.nbytes) for one in whole}
    found = {(one.kind, one.axes, one.in_loop): (one.count, one.nbytes) for one in plan.whole.messages}
    assert found.keys() == counts.keys()
    for (kind, axes, in_loop), (count, nbytes) in counts.items():
        # The optimizer's stacks are filled up to a multiple of the devices
        stacks = kind == "all-to-all" and not in_loop
        close = pytest.approx(nbytes, rel=0.25 if stacks else 0)
        assert found[kind, axes, in_loop] == (count, close), (kind, axes)
    # In a layer rows travel five times, beside their experts' numbers and weights; gathered are weights of attention,
    # router and shared experts, in either pass, and no expert's
    layer = {(one.kind, one.axes, one.in_loop): one.count for one in plan.per_layer["mla"].messages}
    assert layer["all-to-all", ("data", "sequence"), True] == 5 + 4
    assert layer["all-gather", ("data",), False] == 2 * (5 + 1 + 3)
    assert layer["reduce-scatter", ("data",), False] == 5 + 1 + 3
    text = json.dumps(plan.as_json())
    assert json.loads(text)["step"]["bound_by"] in ("FLOPs", "HBM", "links")


def test_jobs_that_no_plan_is_made_for():
    job = TrainJob(K25, topology("v5p:4x4x4"), (), 64, 4096)
    with pytest.raises(ValueError, match=r"states of 160\.\d GB on a device of v5p:4x4x4, .*; v5p:4x8x8 does"):
        train_plan("k2.5", job)
    with pytest.raises(ValueError, match="a batch of 3 rows cannot be sharded over a data axis of 64"):
        train_plan("k2.5", dataclasses.replace(job, sizes=(64, 1, 1, 1), rows=3))
    with pytest.raises(ValueError, match="asks for 8 devices, v5p:4x4x4 has 64"):
        train_plan("k2.5", dataclasses.replace(job, sizes=(8, 1, 1, 1)))
    dense = dataclasses.replace(TOY, text=dataclasses.replace(TOY.text, n_routed_experts=0))
    with pytest.raises(ValueError, match="layers with experts after those without, found another order"):
        train_plan("toy", TrainJob(dense, topology("v5e:2x4"), (8, 1, 1, 1), 8, 64))


def test_the_command_refuses_what_has_no_meaning(capsys):
    common = ["plan", "--train", "--model", "k2.5", "--topology", "v5p:4x8x8", "--no-compile"]
    assert main([*common, "--phase", "prefill"]) != 0
    assert "--train goes without --plot, --phase, --chunk and --draft" in capsys.readouterr().err


def test_what_is_compiled_is_extrapolated_and_shown(capsys, tmp_path, monkeypatch):
    # Given a compiler that counts 1e9 bytes a layer, and a message in each
    def compile_step(job):
        layers = job.config.text.num_hidden_layers
        sent = (Collective("all-to-all", ("data",), 8, 1000, layers),)
        return Compiled(
            arguments=layers * 10**9, results=0, in_place=0, temporaries=layers * 10**8, program=7, hbm_bytes=0,
            accessed=0.0, small_cycles=0, collectives=sent, moved=(), seconds=1.0, cpu_seconds=1.0,
        )  # fmt: skip

    monkeypatch.setattr("kimi_jax.plan.available", lambda: True)
    monkeypatch.setattr("kimi_jax.plan.compiled", compile_step)
    (tmp_path / "config.json").write_text(json.dumps(TOY_JSON))
    command = ["plan", "--train", "--model", str(tmp_path), "--topology", "v5e:2x4", "--tokens", "64"]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    (planned,) = json.loads(out)

    # Then two programs are compiled, of one and of two layers with experts after the one without, and the difference
    # between them is a layer's share
    assert [line.split()[5] for line in err.splitlines()] == ["2", "3"]
    assert planned["extrapolated"]["arguments"] == 3 * 10**9 and planned["extrapolated"]["beside"] == 3 * 10**8 + 7
    assert [one["count"] for one in planned["extrapolated"]["messages"]] == [3]
    assert planned["memory"]["headroom"] == CHIPS["v5e"].memory - 3_300_000_007
    rate = 8 * 64 / planned["step"]["lower_bound_seconds"]
    assert planned["from"] == "compiled" and planned["tokens_per_second"] == rate

    # and the table comes first
    assert main(command) == 0
    first, head, row = capsys.readouterr().out.splitlines()[:3]
    assert "a training step of 8 x 64 tokens" in first and head.split()[1:4] == ["mesh", "chips", "tokens/s"]
    assert row.split()[:2] == ["v5e:2x4", "data=8"] and row.endswith("compiled")
