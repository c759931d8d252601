"""The table of plans: a line for each slice that 80 columns hold, with GPUs, prices and what is refused."""

import dataclasses

import pytest
from rich.console import Console

from kimi_jax import config_json
from kimi_jax.cli import main
from kimi_jax.plan import Job, headroom, plan, search, table
from kimi_jax.plan.planner import with_experts
from kimi_jax.plan.refusal import TooSmallError, as_json
from pallas_kernels.hardware import CHIPS, GPUS
from sharding import mesh_sizes
from sharding.topologies import SHAPES, topologies, topology

LINEAR = config_json.preset("kimi-linear-48b")


def record(name, mesh, tokens_per_second=1234567.8, **more):
    sizes = dict(zip(("data", "expert", "tensor", "sequence"), mesh, strict=True))
    found = {"topology": name, "chips": 2048, "mesh": sizes, "tokens_per_second": tokens_per_second}
    return found | {"step": {"bound_by": "FLOPs"}, "from": "arithmetic"} | more


def refused(name, need=700 * 10**9, enough="tpu7x:8x16x16", int4=None):
    return as_json(topology(name), TooSmallError("too small", need, 102_800_000_000, enough, int4))


@pytest.mark.parametrize("priced", [{}, {"cost": {"per_million_tokens": 12345.678}}], ids=["", "priced"])
@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (16, 1, 8, 16), (128, 4, 2, 4), (16, 16, 2, 8)])
def test_no_line_is_longer_than_80_characters(mesh, priced):
    # Given the longest name of a slice
    records = [
        record("tpu7x:8x16x16", mesh, **priced),
        refused("v5p:8x16x16"),
        refused("rtx-4090:1", 99 * 10**9, None, 90 * 10**9),
    ]
    found = table.lines(records)
    assert len(found) == 4 and max(map(len, found)) <= table.WIDTH, found

    # Then its mesh is whole, in a spelling that --mesh takes
    row = found[1].split()
    assert mesh_sizes(row[1]) == mesh
    assert row[2:4] == ["2048", "1,234,568"] and row[-2:] == ["FLOPs", "arithmetic"]
    assert ("12,345.68" in row) is bool(priced)
    assert found[2].endswith("needs 700.0 of 102.8 GB; take tpu7x:8x16x16")
    assert found[3].endswith("needs 99.0 of 102.8 GB; take --experts int4 (90.0)")


@pytest.mark.parametrize("narrow", [False, True], ids=["pipe", "terminal"])
def test_a_line_for_each_slice_is_printed_first(narrow, capsys, monkeypatch):
    if narrow:
        monkeypatch.setattr(
            "kimi_jax.cli.plan.console",
            lambda stderr=False: Console(stderr=stderr, width=80, force_terminal=not stderr, color_system=None),
        )
    slices = [part for name in ("v5e:2x2", "h100:1", "h200:1") for part in ("--topology", name)]
    assert main(["plan", "--model", "linear-48b", *slices, "--no-compile", "--price", "3", "--details"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].split() == ["slice", "mesh", "chips", "tokens/s", "$/M", "bound", "from"] and err == ""
    assert lines[2].startswith("h200:1") and lines[2].endswith("HBM  arithmetic")
    assert lines[3].startswith("v5e:2x2  needs ") and lines[4].startswith("h100:1   needs ")
    assert "memory of a device" in out
    if narrow:
        assert max(map(len, lines)) <= 80


def test_the_form_in_which_kimi_linear_fits_one_gpu():
    # Given one H100, which 98 GB of bf16 do not fit
    job = Job(LINEAR, topology("h100:1"), (), "decode", 1, 8192)
    with pytest.raises(TooSmallError, match=r"h100:2 would do, with --experts int4 3\d\.\d GB would do") as caught:
        plan("kimi-linear", job)

    # Then INT4 experts do: 30.5 GB of weights, beside a cache and temporaries
    planned = plan("kimi-linear", dataclasses.replace(job, config=with_experts(LINEAR, "int4")))
    assert planned.memory.weights == pytest.approx(30.5e9, rel=0.01)
    assert planned.memory.available - planned.memory.headroom == caught.value.int4
    assert planned.step.hbm_seconds == planned.step.hbm_bytes / 3350e9 and planned.collectives == ()
    # and a consumer's GPU holds neither
    with pytest.raises(TooSmallError, match=r"rtx-4090:2 would do$"):
        plan("kimi-linear", Job(with_experts(LINEAR, "int4"), topology("rtx-4090:1"), (), "decode", 1, 8192))


def test_gpus_that_no_mesh_divides_the_model_by_stay_idle():
    # Given 72 GPUs, by which no number of experts of a Kimi divides
    asked = Job(LINEAR, topology("gb200:72"), (), "decode", 64, 8192)
    assert {one.job.partition.devices for one in search.candidates(asked)} == {64}
    # On a TPU slice all devices are in the mesh
    with pytest.raises(ValueError, match="asks for 4 devices, v5e:2x4 has 8"):
        plan("kimi-linear", Job(LINEAR, topology("v5e:2x4"), (), "decode", 1, 128), sizes=(1, 1, 4, 1))


def test_headroom_falls_with_batch_and_context():
    job = Job(with_experts(LINEAR, "int4"), topology("h100:1"), (1, 1, 1, 1), "decode", 4, 8192)
    found = headroom.headroom(job)
    assert found.contexts[0] == 1024 and found.contexts[-1] == 1_048_576 and found.batches[0] == 1
    for context, row, largest in zip(found.contexts, found.headroom, found.largest, strict=True):
        assert list(row) == sorted(row, reverse=True), context
        assert [left >= 0 for left in row] == [batch <= largest for batch in found.batches], context
    assert list(found.largest) == sorted(found.largest, reverse=True)


def test_the_list_of_slices(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--list"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, out.splitlines())) <= 80
    heads, shapes = out.splitlines()[: 2 * len(SHAPES) : 2], out.splitlines()[1 : 2 * len(SHAPES) : 2]
    named = [f"{head.split(':')[0]}:{shape}" for head, row in zip(heads, shapes, strict=True) for shape in row.split()]
    assert named == [one.name for one in topologies()] and set(SHAPES) == set(CHIPS | GPUS)


@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_has_its_vendors_numbers(kind):
    """The totals that the data sheets of whole systems give, and the peaks that count sparse products."""
    gpu = GPUS[kind]
    systems = {"b200": (8, 1440, 64), "gb200": (72, 13400, 576)}
    sparse = {"h100": 1979, "h200": 1979, "b200": 4500, "gb200": 5000, "rtx-4090": 330.4}
    assert 2 * gpu.bf16 == sparse[kind] * 1e12
    if kind in systems:
        count, memory, bandwidth = systems[kind]
        assert 1 < count * gpu.memory / (memory * 1e9) < 1.08 and count * gpu.hbm == bandwidth * 1e12
