"""Steps and kernels compile for a GPU that this machine does not have, within their limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_jax.plan import gpu_target
from pallas_kernels.hardware import GPUS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
compiles = pytest.mark.skipif(
    gpu_target.toolkit() is None, reason="the compiler for NVIDIA GPUs is not installed (the extra gpu-compile)"
)


def run(script, *arguments):
    # The compiler has its own flags, without those that the tests set for this process's devices.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@compiles
@pytest.mark.parametrize(
    "case", ["Kimi Linear in INT4, 4 tokens", pytest.param("", marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_no_kernel_takes_more_than_its_budget(case):
    done = run("gpu_kernels.py", "--budget", "--case", case)
    assert done.returncode == 0, done.stdout + done.stderr


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("form", ["bf16", "int4"])
def test_a_decode_step_moves_little_more_than_it_needs_and_no_expert(form):
    done = run("gpu_compile.py", "--check", "--format", form, "--rows", "1", "--rows", "32")
    assert done.returncode == 0, done.stdout + done.stderr


@compiles
@pytest.mark.slow
def test_the_vision_tower_has_no_buffer_of_all_scores():
    done = run("gpu_compile.py", "--check", "--vision")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4,096 patches" in done.stdout


def test_a_target_has_what_the_data_sheet_says():
    text = gpu_target.target_config(GPUS["h100"])
    for part in ("core_count: 132 ", "memory_bandwidth: 3350000000000 ", "major: 9 minor: 0", "NVIDIA H100 80GB HBM3"):
        assert part in text
    with pytest.raises(ValueError, match="b200: expected a GPU that is described to the compiler"):
        gpu_target.target_config(GPUS["b200"])


def test_says_that_the_compiler_is_not_installed(monkeypatch):
    monkeypatch.setattr(gpu_target, "toolkit", lambda: None)
    with pytest.raises(ValueError, match=r"pip install 'kimi-jax\[gpu-compile\]'"):
        gpu_target.environment()
