"""Several processes, each with devices of its own: they give the tokens of one, each reads a part of the checkpoint,
and all end together."""

import contextlib
import io
import json
import re
import socket
import time

import pytest
from several_processes import run_job, started

from checkpoints.toy import toy_config, write_toy
from kimi_jax.cli import main

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "first_k_dense_replace": 0, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
OPTIONS = ["--prompt", "Hello", "--max-new-tokens", "8", "--dtype", "float32", "--mesh", "1x8", "--greedy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("processes") / "k2", toy_config("k2", **SIZES))


@pytest.fixture(scope="module")
def single(folder):
    """Returns the answer that one process with eight devices writes."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["generate", str(folder), *OPTIONS]) == 0
    assert len(out.getvalue()) > 3
    return out.getvalue()


def generate(folder, options=OPTIONS):
    return ["generate", folder, *options]


@pytest.mark.slow  # (an engine on two does, below, and test_load.py counts what each reads)
def test_two_processes_give_the_tokens_of_one(folder, single):
    # When two processes with four devices each run the command
    first, second = run_job(generate(folder), generate(folder))

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


def test_an_engine_on_two_processes_answers_until_one_is_killed(folder, single, tmp_path):
    # Given prompts of which the last takes long
    lines = [
        {"id": "a", "prompt": "Hello"},
        {"id": "b", "prompt": "Hello"},
        {"prompt": "Go on", "max_new_tokens": 3000},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--prompts", prompts, *OPTIONS[2:], "--slots", "4", "--prefill-chunk", "16", "--cache-memory", "4MiB"]

    # When one of two processes is killed before the engine has the last answer
    with started(*[generate(folder, options)] * 2) as (first, second):
        results = [json.loads(first.stdout.readline()) for _ in range(2)]
        second.kill()
        killed = time.monotonic()
        out, err = first.communicate(timeout=60)
        took = time.monotonic() - killed

    # Then the others are those of one process, and the other process soon ends with the name of the killed one
    content = re.sub(r"<\|\w+\|>", "", single).rstrip("\n")  # a result has no special tokens
    assert content and [result["content"] for result in results] == [content, content]
    assert sorted(result["id"] for result in results) == ["a", "b"] and out == "", out
    assert first.returncode == 1 and took < 10, (first.returncode, took, err)
    host = socket.gethostname()
    (line,) = re.findall("^kimi-jax: .*", err, re.M)
    assert line.startswith(f"kimi-jax: process 1 of 2 (host {host}) is lost"), err


def test_one_that_fails_ends_all_with_its_reason(folder, tmp_path):
    first, second = run_job(generate(folder), generate(tmp_path / "nowhere"))
    for code, out, err in (first, second):
        assert (code, out) == (1, "")
        assert re.findall("^kimi-jax: .*", err, re.M) == [
            f"kimi-jax: process 1 of 2: {tmp_path}/nowhere: no such folder"
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
