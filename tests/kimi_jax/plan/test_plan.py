"""Plans: bytes against closed forms, the choice of a mesh, refused jobs, and a step compiled for a TPU slice."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess

import pytest
from rich.console import Console

from checkpoints.toy import head_config, toy_config
from kimi_jax import config_json, plan
from kimi_jax.cli import main
from kimi_jax.plan import analytic, gpu_target, report, search
from kimi_jax.plan.compile import Compiled, DoesNotFitError
from kimi_jax.plan.messages import messages
from kimi_jax.plan.traffic import MovedWeight
from sharding import AXES, mesh_sizes
from sharding.topologies import SHAPES, topology

LIBTPU = pytest.mark.skipif(not plan.available(), reason="libtpu, the TPU compiler, is not installed")
K25, LINEAR = config_json.preset("kimi-k2.5"), config_json.preset("kimi-linear-48b")
TOY = {
    "num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "n_routed_experts": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 512, "vocab_size": 2048,
}  # fmt: skip


def job(config, slice_, mesh, batch=64, context=8192, phase="decode", chunk=1):
    return plan.Job(config, topology(slice_), mesh_sizes(mesh), phase, batch, context, chunk)


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_every_weight_of_k25_is_counted_once():
    """The bytes are those of the published shapes, which follow from config.json's fields."""
    memory = analytic.memory(job(K25, "v6e:8x8", "data=8,tensor=8"))
    # INT4 codes and a bf16 scale for 32 of them, over all 64 devices
    assert memory.experts == 60 * 384 * 3 * 7168 * 2048 * (4 / 8 + 2 / 32) / 64
    # a device has 8 of 64 heads: their parts of four projections; and whole low-rank projections and norms
    heads = 12288 * 1536 + 16384 * 512 + 7168 * 8192 + 1536 * 7168 + 576 * 7168
    assert memory.attention == 61 * 2 * (heads // 8 + 1536 + 512)
    assert memory.embeddings == 2 * 163840 * 7168 * 2 // 8
    shared, dense, router = 3 * 7168 * 2048 // 64, 3 * 7168 * 18432 // 8, 384 * 7168
    norms = 61 * 2 * 7168 + 7168
    assert memory.other_weights == 2 * (60 * (shared + router) + dense + norms) + 60 * 384 * 4
    assert memory.headroom == memory.available - sum(
        getattr(memory, part)
        for part in ("experts", "attention", "embeddings", "other_weights", "vision", "cache", "temporaries")
    )


@pytest.mark.parametrize(("mesh", "devices_with_a_token"), [("sequence=64", 64), ("tensor=8,sequence=8", 8)])
def test_the_cache_of_k25_at_full_length(mesh, devices_with_a_token):
    memory = analytic.memory(job(K25, "v6e:8x8", mesh, batch=1, context=262_144))
    assert memory.cache * devices_with_a_token == 262_144 * 576 * 2 * 61


def test_the_cache_of_kimi_linear_at_full_length():
    memory = analytic.memory(job(LINEAR, "v5e:2x4", "tensor=2,sequence=4", batch=1, context=1_048_576))
    latents = 1_048_576 * 576 * 2 * 7 // 4
    states = 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2) // 2
    assert memory.cache == latents + states


def test_a_layer_of_k25_on_64_chips():
    """The bounds are well below jax-llm-examples' 0.469 GB resident (docs/planner.md)."""
    whole, split = (job(K25, "v6e:8x8", mesh) for mesh in ("data=8,tensor=8", "data=8,sequence=8"))
    assert analytic.per_layer(whole).resident <= 0.26e9 and analytic.per_layer(split).resident <= 0.20e9
    counts = [sum(one.count for one in messages(j)) for j in (whole, split)]
    assert counts == [3 * 61 + 1, 5 * 61 + 1]  # and the embeddings' sum
    # the experts that 64 tokens choose, if all choices are equally likely: 1 - (1 - 8/384)^64 of them
    share = 1 - (1 - 8 / 384) ** 64
    experts = 384 * 3 * 7168 * 2048 * 0.5625 / 64
    unread = analytic.per_layer(whole).resident - analytic.per_layer(whole).read
    assert math.isclose(unread, experts * (1 - share), rel_tol=1e-6)


def test_a_step_reads_and_multiplies_at_least():
    # Given one row on one mesh axis, so that heads and experts are sharded and nothing else is
    one_row = job(LINEAR, "v6e:2x2", "tensor=4", batch=1, context=128)
    step = analytic.step(one_row, [])
    memory = analytic.memory(one_row)
    unread = memory.experts * (1 - 8 / 256) + 163840 * 2304 * 2 / 4  # seven of eight experts, and the embeddings
    states = 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2) / 4  # read and written
    assert math.isclose(step.hbm_bytes, memory.weights - unread + memory.cache + states, rel_tol=1e-9)
    # Then a step has two FLOPs for each of the 3e9 weights that a token uses, over four chips, and the cache's products
    assert 2 * 2.6e9 / 4 < step.flops < 2 * 3.6e9 / 4
    assert step.hbm_seconds == step.hbm_bytes / 1640e9 and step.bound_by == "HBM"
    # and a prefill is bound by products
    long = job(LINEAR, "v6e:2x2", "tensor=4", batch=8, context=8192, phase="prefill", chunk=8192)
    assert analytic.step(long, []).bound_by == "FLOPs"


def test_the_largest_that_fit():
    wanted = job(K25, "v6e:8x8", "data=8,tensor=8")
    batch, context = analytic.largest_batch(wanted), analytic.largest_context(wanted)
    for change, fits in [
        ({"batch": batch}, True), ({"batch": batch + 8}, False),
        ({"context": context}, True), ({"context": context + 128}, False),
    ]:  # fmt: skip
        assert (analytic.memory(dataclasses.replace(wanted, **change)).headroom >= 0) is fits
    assert batch % 8 == 0 and context % 128 == 0
    # the compiler's temporaries leave less room
    assert analytic.largest_batch(wanted, temporaries=10 * 2**30) < batch
    # a model's own length is the limit, whatever the memory
    assert analytic.largest_context(job(K25, "v6e:8x8", "sequence=64", batch=1)) == 262_144


# --- the choice of a mesh ---------------------------------------------------------------------------------------------


def test_the_best_mesh_fits_and_is_the_fastest():
    ranked = list(search.ranked(search.candidates(job(LINEAR, "v5p:2x2x1", "1x4"))))
    fit = [one for one in ranked if not one.bytes_over]
    assert fit == ranked[: len(fit)] and len(fit) > 0
    assert [one.cost for one in fit] == sorted(one.cost for one in fit)
    assert all(math.prod(one.job.sizes) == 4 for one in ranked)
    assert len({one.job.sizes for one in ranked}) == len(ranked)


def test_every_mesh_that_divides_is_considered():
    # 8 devices, a batch of 2, 32 heads: 2^3 over four axes in 20 ways, in which data is 1 or 2
    assert len(search.candidates(job(LINEAR, "v5e:2x4", "1x8", batch=2))) == sum(
        data * expert * tensor * sequence == 8
        for data in (1, 2) for expert in (1, 2, 4, 8) for tensor in (1, 2, 4, 8) for sequence in (1, 2, 4, 8)
    )  # fmt: skip


def test_a_plan_shows_the_whole_cache_and_the_split_one():
    planned = plan.plan("K2.5", job(K25, "v6e:8x8", "1x64"))
    kinds = [planned.job.mesh["sequence"] > 1] + [other.mesh["sequence"] > 1 for other in planned.alternatives]
    assert sorted(kinds) == [False, True]
    assert planned.step.lower_bound_seconds <= planned.alternatives[0].lower_bound_seconds
    assert planned.compiled is None and planned.confirmed is None


def fake(compiled):
    """Returns a compiler that reports the same for every job, but has no room for more than 100 rows."""

    def compile_step(job):
        if job.batch > 100:
            raise DoesNotFitError("Ran out of memory in memory space hbm")
        return compiled

    return compile_step


def test_what_the_compiler_says_is_told():
    wanted = job(K25, "v6e:8x8", "1x64")
    sizes = mesh_sizes("data=8,tensor=8")
    memory = analytic.memory(dataclasses.replace(wanted, sizes=sizes))
    compiled = Compiled(
        arguments=memory.weights + memory.cache, results=10, in_place=4, temporaries=2**30, program=2**20, hbm_bytes=1,
        accessed=1.0, small_cycles=3_500_000, collectives=(), moved=(MovedWeight("all-gather", "gather.1", 2**22),),
        seconds=1.0, cpu_seconds=1.0,
    )  # fmt: skip
    planned = plan.plan("K2.5", wanted, sizes=sizes, compile_step=fake(compiled))
    assert planned.warnings == ("a gather of weights: all-gather gather.1 of 4.2 MB",)
    assert planned.memory.temporaries == 2**30 + 2**20 + 6 and planned.collectives == ()
    assert planned.confirmed is False and planned.largest_batch > 100
    out = io.StringIO()
    report.show(Console(file=out, width=1000), planned)
    # 3.5e6 cycles at v6e's 1.75 GHz are a row of their own, and in the sum
    assert re.search(r"small operations +2\.000 +3,500,000 cycles by the compiler's estimate", out.getvalue())
    alone = analytic.step(planned.job, ()).lower_bound_seconds
    assert math.isclose(planned.step.lower_bound_seconds, alone + 2e-3) and planned.step.bound_by == "HBM"
    assert planned.tokens_per_second == 64 / planned.step.lower_bound_seconds
    # and a notice says so where its count differs from the plan's
    copies = (MovedWeight("copy", "c.1", 2**22), MovedWeight("copy", "c.2", 2**23), MovedWeight("copy", "c.3", 2**22))
    miscounted = dataclasses.replace(compiled, arguments=int(1.04 * compiled.arguments), moved=copies)
    notices = plan.plan("K2.5", wanted, sizes=sizes, compile_step=fake(miscounted)).warnings
    assert notices[0] == "a copy in HBM of weights: copy c.1 and 1 more, each of 4.2 MB"
    assert notices[1] == "a copy in HBM of weights: copy c.2 of 8.4 MB" and "the compiler counts" in notices[2]
    with pytest.raises(ValueError, match="should fit on v6e:8x8 with mesh data=8,tensor=8, but the compiler says: Ran"):
        plan.plan("K2.5", dataclasses.replace(wanted, batch=128), sizes=sizes, compile_step=fake(compiled))


# --- the command ------------------------------------------------------------------------------------------------------


def asked(capsys, *arguments):
    assert main(["plan", *arguments, "--no-compile"]) == 0
    return capsys.readouterr()


def test_a_plan_in_json(capsys):
    slices = ["--topology", "v5e:2x2", "--topology", "v5e:2x4", "--topology", "v6e:2x2"]
    out, err = asked(capsys, "--model", "linear-48b", *slices, "--batch", "4", "--json", "--price", "2")
    none, first, second = json.loads(out)
    assert none["topology"] == "v5e:2x2" and "v5e:2x4 would do" in none["error"] and err == ""
    assert none["needs"]["bytes"] > none["needs"]["available"] and none["needs"]["smallest"] == "v5e:2x4"
    assert (first["topology"], first["devices"], second["topology"]) == ("v5e:2x4", 8, "v6e:2x2")
    for one in (first, second):
        assert set(one) == {
            "model", "topology", "chips", "devices", "mesh", "why", "from", "versions", "phase", "batch", "context",
            "chunk", "draft", "memory", "per_layer", "step", "tokens_per_second", "collectives", "largest", "others",
            "engine", "alternatives", "compiled", "warnings", "cost",
        }  # fmt: skip
        assert list(one["mesh"]) == list(AXES) and math.prod(one["mesh"].values()) == one["devices"]
        memory = one["memory"]
        assert memory.pop("available") == sum(memory.values())
        assert set(memory) == {
            "experts", "attention", "embeddings", "other_weights", "vision", "draft_head", "cache", "temporaries",
            "headroom",
        }  # fmt: skip
        step = one["step"]
        assert step["lower_bound_seconds"] == max(step[f"{kind}_seconds"] for kind in ("hbm", "flops", "sent")) > 0
        for message in one["collectives"]:
            assert set(message) == {"kind", "axes", "group", "nbytes", "count", "in_loop", "to_all", "sent"}
        assert one["largest"]["batch"] >= 4 and one["compiled"] is None
        assert one["tokens_per_second"] == pytest.approx(4 / step["lower_bound_seconds"])
        hours = 1e6 / one["tokens_per_second"] / 3600
        assert one["cost"] == {"per_chip_hour": 2.0, "per_million_tokens": pytest.approx(2 * one["chips"] * hours)}


def test_a_plan_in_words(capsys):
    mesh = ["--mesh", "data=2,tensor=4", "--batch", "2"]
    out, _ = asked(capsys, "--model", "kimi-linear-48b", "--topology", "v5e:2x4", *mesh)
    words = " ".join(out.split())
    assert "kimi-linear-48b, decode of 2 x 8,192 tokens on v5e:2x4 (8 devices) mesh data=2,tensor=4: given or " in words
    memory = analytic.memory(job(LINEAR, "v5e:2x4", "data=2,tensor=4", batch=2))
    for kind, size in (("experts", memory.experts), ("cache", memory.cache), ("headroom", memory.headroom)):
        assert re.search(rf"{kind} {size / 1e9:.3f} ", words), words
    assert "(lower bound, HBM)" in words and "Not compiled" in words and "all-reduce data, tensor 8 " in words


def test_a_step_that_verifies_drafts(capsys, tmp_path):
    # Given a toy with a head
    config = toy_config("k2", **TOY)
    for name, written in (("model", config), ("head", head_config(config, "eagle3-mla"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(written))
    flags = ["--model", str(tmp_path / "model"), "--topology", "v5e:2x4", "--batch", "8", "--draft-tokens", "2"]
    found = {}
    for draft in ("prompt-lookup", str(tmp_path / "head")):
        out, _ = asked(capsys, *flags, "--draft", draft, "--json")
        (found[draft],) = json.loads(out)
        assert found[draft]["draft"]["tokens"] == 2 and found[draft]["chunk"] == 3
    looked, headed = found.values()
    assert looked["memory"]["draft_head"] == 0 < headed["memory"]["draft_head"]
    assert looked["step"]["hbm_bytes"] < headed["step"]["hbm_bytes"]
    out, _ = asked(capsys, *flags, "--draft", str(tmp_path / "head"))
    assert "2 drafts a row, of an Eagle3 head in the mla form" in out and "draft head " in out
    # and a step that drafts nothing is refused, as is the head of another model
    for wrong, reason in (
        (["--phase", "prefill"], "--draft goes with decode steps"),
        (["--train"], "--train goes without"),
        (["--model", "k2.5"], "but that of its target is 7168"),
        (["--draft", str(tmp_path / "model")], "is a model, not a draft head"),
    ):
        assert main(["plan", *flags, "--no-compile", "--draft", str(tmp_path / "head"), *wrong]) == 1
        assert reason in capsys.readouterr().err


def test_every_slice_that_is_known(capsys, tmp_path, monkeypatch):
    # Given two kinds of chips with a slice or two, which stand for all
    monkeypatch.setattr("sharding.topologies.SHAPES", {"v5e": SHAPES["v5e"][:2], "tpu7x": SHAPES["tpu7x"][:1]})
    (tmp_path / "config.json").write_text(json.dumps(toy_config("k2", **TOY)))
    out, _ = asked(capsys, "--model", str(tmp_path), "--topology", "all", "--batch", "8", "--json")
    assert [one["topology"] for one in json.loads(out)] == ["v5e:2x2", "v5e:2x4", "tpu7x:2x2x1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--topology", "v5p:3x3x3"], "topology 'v5p:3x3x3' is none of v5e:{2x2,2x4,4x4,4x8,8x8,8x16,16x16}; v5p:{2x"),
        (["--topology", "v6e:8x8", "--mesh", "data=4,expert=8"], "mesh data=4,expert=8 asks for 32 devices, v6e:8x8"),
        (["--topology", "v6e:8x8", "--mesh", "data=64", "--batch", "3"], "a batch of 3 rows cannot be sharded over"),
        (["--topology", "v6e:8x8", "--mesh", "rows=64"], "expected two to four positive numbers for the axes data"),
        (["--topology", "v6e:8x8", "--context", "300000"], "max_position_embeddings = 262144 tokens"),
        (["--topology", "v6e:8x8", "--phase", "prefill", "--chunk", "9000"], "a chunk of 9000 tokens: expected 1 to"),
        (["--topology", "v5e:4x4"], "GB too much; v5e:8x8 would do"),
        (["--topology", "v6e:2x2", "--batch", "6400001"], "GB too much; no known v6e slice would do"),
        (["--topology", "v5e:2x2", "--topology", "v5e:2x4"], "GB too much"),
        (["--topology", "v6e:8x8", "--model", "k9"], "no preset 'k9'; there are kimi-k2"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, reason, capsys):
    model = [] if "--model" in arguments else ["--model", "k2.5"]
    assert main(["plan", *model, *arguments, "--no-compile"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("kimi-jax: ") and reason in err, err


# --- compilers --------------------------------------------------------------------------------------------------------


def test_slices_without_a_compiler_are_planned_by_arithmetic(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(toy_config("k2", **TOY)))
    monkeypatch.setattr(gpu_target, "toolkit", lambda: None)
    monkeypatch.setattr(plan.compile, "available", lambda: False)
    slices = ["--topology", "h100:1", "--topology", "h200:1"]
    assert main(["plan", "--model", str(tmp_path), *slices, "--batch", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [one["from"] for one in json.loads(out)] == ["arithmetic"] * 2
    # and the reason is said once, with what to install
    assert err == "the compiler for NVIDIA GPUs is not installed (pip install 'kimi-jax[gpu-compile]'): arithmetic\n"
    assert plan.missing(topology("v6e:2x2")) == "libtpu is not installed (Linux x86-64: pip install libtpu)"
    # Where it is, GPUs that it has no description of and training steps remain
    monkeypatch.setattr(gpu_target, "toolkit", lambda: tmp_path)
    assert plan.missing(topology("h100:8")) is None
    assert "expected a GPU that is described to the compiler" in plan.missing(topology("gb200:8"))
    assert plan.missing(topology("h100:8"), training=True) == "training steps are not compiled for GPUs"


def test_a_gpus_program_that_is_larger_than_its_memory_does_not_fit(monkeypatch, tmp_path):
    # Given a compiler that says how much a program takes, and does not compare it with the GPU's memory
    said = {
        "arguments": 80 * 10**9, "results": 2, "in_place": 1, "temporaries": 5 * 10**9, "program": 0, "hbm_bytes": 1,
        "accessed": 0.0, "small_cycles": 0, "collectives": [], "moved": [], "seconds": 1.0, "cpu_seconds": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(gpu_target, "toolkit", lambda: tmp_path)
    started = []

    def run(command, **options):
        started.append(options["env"])
        return subprocess.CompletedProcess(command, 0, json.dumps(said).encode(), b"")

    monkeypatch.setattr(subprocess, "run", run)
    assert plan.compiled(job(K25, "h100:1", "1x1")).beside_arguments == 5 * 10**9 + 1
    # it starts with the assembler in its path, and without other flags than its own
    assert started[0]["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")
    assert started[0]["XLA_FLAGS"] == f"--xla_gpu_cuda_data_dir={tmp_path} --xla_gpu_autotune_level=0"
    said["temporaries"] += 10**9
    with pytest.raises(DoesNotFitError, match=r"Ran out of memory: 86\.00 GB of 85\.52"):
        plan.compiled(job(K25, "h100:1", "1x1"))


# --- compiled for a TPU that is not here ------------------------------------------------------------------------------


@pytest.mark.slow  # quick beside it: test_plan_messages.py
@LIBTPU
def test_a_step_compiled_through_the_command(capsys, tmp_path):
    # Given a small K2 with a long cache, so that the largest batch is small too, and a mesh that shards every dimension
    (tmp_path / "config.json").write_text(json.dumps(toy_config("k2", **TOY)))
    mesh = ["--mesh", "data=2,tensor=2,sequence=2", "--batch", "8", "--context", "131072"]
    assert main(["plan", "--model", str(tmp_path), "--topology", "v5e:2x4", *mesh, "--json"]) == 0
    out, err = capsys.readouterr()
    (planned,) = json.loads(out)

    # Then the compiler counts what the plan counts, and moves no weight
    compiled, memory = planned["compiled"], planned["memory"]
    weights = sum(memory[kind] for kind in ("experts", "attention", "embeddings", "other_weights"))
    assert abs(compiled["arguments"] - weights - memory["cache"]) < 0.03 * weights
    assert planned["largest"]["confirmed"] is True and 8 < planned["largest"]["batch"] < 300
    assert planned["warnings"] == [] and compiled["moved"] == []
    assert err.count("compiling decode of ") == 2
    # and messages are activations, five a layer with a sharded cache, beside the embeddings' sum
    assert sum(message["count"] for message in planned["collectives"]) <= 5 * 2 + 1
    for message in planned["collectives"]:
        merge = message["kind"] == "all-to-all" and message["axes"] == ["sequence"]
        assert message["nbytes"] <= (4 * 4 * 514 * 4 if merge else 8 * 1024 * 4), message
        assert message["axes"] and set(message["axes"]) <= {"data", "tensor", "sequence"}
