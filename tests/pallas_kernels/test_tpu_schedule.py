"""The kernels compiled for TPUs that are not here, held to the budget recorded for the installed libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "benchmarks" / "tpu_schedule.py"
BUDGETS = ROOT / "benchmarks" / "tpu" / "budgets"
# Their code is in others too, and they take the compiler long.
REST = {"int4_grouped_glu 7168x2048 M=8 x 8", "mla_write 1 sequences, 2048 rows from 64"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Its own flags: those that the tests set for this process's devices are not the compiler's.
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


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a case each", "the rest"])
def test_no_kernel_costs_more_than_its_budget(tmp_path, slow):
    listed = {case: chips for case, chips in json.loads(recorded().read_text()).items() if (case in REST) == slow}
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(listed))
    done = run("--budget", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert listed
    for case in listed:
        assert case in done.stdout


def test_a_kernel_beyond_its_budget_is_named(tmp_path):
    # Given a budget that allows the first kernel ten percent less than it takes, and a kernel that does not exist
    listed = json.loads(recorded().read_text())
    case, chips = next(iter(listed.items()))
    chip, limit = next(iter(chips.items()))
    path = tmp_path / "budget.json"
    path.write_text(
        json.dumps({case: {chip: limit | {"bundles_per_unit": 0.9 * limit["bundles_per_unit"]}}, "x": {chip: {}}})
    )

    # When the tool holds the kernels to it
    done = run("--budget", str(path))

    # Then it fails and names both
    assert done.returncode == 1
    assert f"{case} on {chip}: bundles_per_unit" in done.stderr
    assert f"x on {chip}: in the budget, but there is no such case" in done.stderr
