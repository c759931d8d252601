"""The kernels compiled for TPUs that this machine does not have stay within the budget of the installed libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tpu_schedule
from tpu.budget import SLACK
from tpu.case import Row

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "benchmarks" / "tpu_schedule.py"
BUDGETS = ROOT / "benchmarks" / "tpu" / "budgets"
FORWARD, BACKWARD = (f"kda{kernel} H=32 4k tokens, any gate" for kernel in ("", " backward"))
# Kernels of few rows, beside which nothing runs, and one of a state.
QUICK = {
    "int4_matmul 7168x2048 M=8",
    "int4_grouped_matmul 7168x2048 M=8 x 8",
    "kda_step H=32 batch 64",
}
# Times and bytes of a row, which no budget limits.
UNUSED = {"seconds": 1.0, "hbm_seconds": 1.0, "mxu_seconds": 1.0, "temporaries": 0, "glue": [], "loops": []}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The compiler has its own flags, without those that the tests set for this process's devices.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def recorded() -> Path:
    path = BUDGETS / f"libtpu-{version('libtpu')}.json"
    if not path.exists():
        pytest.skip(
            f"no budget is recorded for libtpu {version('libtpu')} (benchmarks/tpu_schedule.py --record makes one)"
        )
    return path


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["three kernels", "the rest"])
def test_no_kernel_costs_more_than_its_budget(tmp_path, slow):
    listed = {case: chips for case, chips in json.loads(recorded().read_text()).items() if (case not in QUICK) == slow}
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(listed))
    done = run("--budget", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert listed
    for case in listed:
        assert case in done.stdout


def test_nothing_runs_beside_an_int4_product_of_few_rows():
    listed = json.loads(recorded().read_text())
    names = [name for name in listed if name.startswith(("int4_matmul", "int4_grouped_matmul 7168x2048"))]
    if not any("M=16" in name for name in names):
        pytest.skip(f"no budget of INT4 is recorded for libtpu {version('libtpu')}")
    for name in names:
        assert [limit["beside"] for limit in listed[name].values()] == [0] * len(listed[name])


def test_the_gradient_of_kda_costs_at_most_two_and_a_half_times_the_forward_kernel():
    listed = json.loads(recorded().read_text())
    if FORWARD not in listed:
        pytest.skip(f"no budget of KDA is recorded for libtpu {version('libtpu')}")
    forward, backward = (listed[case]["v6e"]["bundles_per_unit"] for case in (FORWARD, BACKWARD))
    assert SLACK * backward <= 2.5 * forward


def test_a_kernel_beyond_its_budget_is_named(tmp_path, monkeypatch, capsys):
    # Given a kernel that takes exactly its budget, and a budget that allows it ten percent less
    case, chips = next(iter(json.loads(recorded().read_text()).items()))
    chip, limit = next(iter(chips.items()))
    less = limit | {"bundles_per_unit": 0.9 * limit["bundles_per_unit"]}
    exact = Row(case, chip, limit["bundles_per_unit"], spills=limit["spills"], **UNUSED)
    monkeypatch.setattr(tpu_schedule, "measure", lambda case, chip: exact)

    # When the tool holds it to either, and to a kernel that does not exist
    def main(budget):
        path = tmp_path / "budget.json"
        path.write_text(json.dumps(budget))
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--budget", str(path)])
        return tpu_schedule.main(), capsys.readouterr().err.splitlines()

    # Then only the budget that it is beyond, and the kernel that is nowhere, are named
    assert main({case: {chip: limit}}) == (0, [])
    code, (over, nowhere) = main({case: {chip: less}, "x": {chip: {}}})
    assert code == 1
    assert over.startswith(f"{case} on {chip}: bundles_per_unit")
    assert nowhere == f"x on {chip}: in the budget, but there is no such case"
