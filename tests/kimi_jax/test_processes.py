"""Several processes, each with devices of its own: they give the tokens of one, each reads a part of the checkpoint,
and all end together."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.toy import toy_config, write_toy
from kimi_jax.cli import main

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "first_k_dense_replace": 0, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
OPTIONS = ["--prompt", "Hello", "--max-new-tokens", "8", "--dtype", "float32", "--mesh", "1x8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("processes") / "k2", toy_config("k2", **SIZES))


def run_job(*folders):
    """Runs a process with four devices for each folder, all in one job, and returns (exit code, standard output, error)
    of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    job = ["--distributed", "--coordinator", coordinator, "--num-processes", str(len(folders))]
    script = Path(__file__).parents[1] / "support" / "one_of_several.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, "generate", folder, *OPTIONS, *job, "--process-id", str(i)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, folder in enumerate(folders)
    ]
    try:
        ended = [(process.communicate(timeout=900), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(code, out, err) for (out, err), code in ended]


def test_two_processes_give_the_tokens_of_one(folder, capsys):
    # Given the answer of one process with eight devices
    assert main(["generate", str(folder), *OPTIONS]) == 0
    single = capsys.readouterr().out
    assert len(single) > 3

    # When two processes with four devices each run the command
    first, second = run_job(folder, folder)

    # Then the first prints the answer, and the second nothing
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert (first[1], second[1]) == (single, "")
    assert "8 tokens; the first after" in first[2] and "tokens" not in second[2]
    # and each has read its half of the experts, and all other weights
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    experts = 8 * 3 * 64 * 32 * 2
    for _, _, err in (first, second):
        (read,) = re.findall(r"^read (\d+) bytes$", err, re.M)
        assert experts / 2 < int(read) < weights - 0.4 * experts


def test_one_that_fails_ends_all_with_its_reason(folder, tmp_path):
    first, second = run_job(folder, tmp_path / "nowhere")
    for code, out, err in (first, second):
        assert (code, out) == (1, "")
        assert re.findall("^kimi-jax: .*", err, re.M) == [
            f"kimi-jax: process 1 of 2: {tmp_path}/nowhere/tiktoken.model: no such file; a Kimi tokenizer needs it"
        ]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--distributed"], "--distributed needs --mesh"),
        (["--mesh", "1x8", "--num-processes", "2"], "--coordinator, --num-processes and --process-id go with"),
    ],
)
def test_flags_that_do_not_go_together(folder, flags, reason, capsys):
    assert main(["generate", str(folder), "--prompt", "Hello", *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-jax: {reason}") and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "reason", ["coordinator_address should be defined.", "distributed.initialize should only be called once."]
)
def test_processes_that_do_not_meet(folder, reason, monkeypatch, capsys):
    # (this process has initialised its devices, so JAX cannot connect it to others)
    def initialize(*arguments):
        assert arguments == ("host:1", 2, 0)
        raise ValueError(reason)

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    job = ["--distributed", "--coordinator", "host:1", "--num-processes", "2", "--process-id", "0"]
    assert main(["generate", str(folder), *OPTIONS, *job]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kimi-jax: the processes did not meet ({reason}); on a TPU pod") and "--process-id I" in err
