"""`kimi-jax serve --distributed`: process 0 answers, another one computes with it, and both end together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

import kimi_jax
from checkpoints.toy import toy_config, write_toy
from kimi_jax import cli
from kimi_jax.processor import Processor
from sharding import make_mesh

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "first_k_dense_replace": 0, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
SERVE = ["--mesh", "1x8", "--dtype", "float32", "--slots", "2", "--prefill-chunk", "16", "--cache-memory", "4MiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("served") / "k2", toy_config("k2", **SIZES))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def job(folder):
    """Starts two processes with four devices each, and yields them with the server's address once it is ready."""
    url, coordinator = f"http://127.0.0.1:{free_port()}", f"localhost:{free_port()}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    who = ["--port", url.rpartition(":")[2], "--distributed", "--coordinator", coordinator, "--num-processes", "2"]
    script = Path(__file__).parents[2] / "support" / "one_of_several.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, "serve", folder, *SERVE, *who, "--process-id", str(index)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        assert running[0].stdout.readline() == f"serving k2 at {url}/v1\n", running[0].stderr.read()
        yield url, *running
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_serve_the_answer_of_one_until_sigterm(folder):
    # Given the greedy answer of one process with all eight devices
    processor = Processor.from_folder(folder)
    prompt = processor([{"role": "user", "content": "Hello"}])
    model = kimi_jax.load(folder, mesh=make_mesh("1x8"), dtype="float32")
    tokens = np.asarray(kimi_jax.generate(model, prompt.tokens, max_new_tokens=8))

    # When two serve it and the first gets SIGTERM, as does the second just before
    with job(folder) as (url, first, second), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        said = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="k2", messages=said, max_tokens=8, temperature=0)
        second.send_signal(signal.SIGTERM)
        again = client.chat.completions.create(model="k2", messages=said, max_tokens=8, temperature=0)
        first.send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=60) for process in (first, second)]

    # Then both gave that answer, and ended well
    expected = processor.parse(tokens[0].tolist(), thinking=False, finish="length").content
    assert [one.choices[0].message.content for one in (answer, again)] == [expected, expected]
    assert (first.returncode, second.returncode) == (0, 0), ended
    assert ended[0][1].rstrip().rpartition("\n")[0].endswith("stopped") and ended[1][0] == ""


@pytest.mark.slow
def test_a_lost_process_ends_its_clients_answers_and_the_job(folder):
    with job(folder) as (url, first, second), httpx.Client(base_url=url, timeout=30.0) as http:
        said = {"model": "k2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4000, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=said) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            assert next(lines)
            second.kill()
            killed, health = time.monotonic(), ""
            *_, last = lines
            with contextlib.suppress(httpx.TransportError):
                while "is lost or has failed" not in health:
                    health = http.get("/health").text
        _, err = first.communicate(timeout=60)
        took = time.monotonic() - killed
    assert '"server_error"' in last or '"unavailable' in last, last
    assert "is lost or has failed" in health and socket.gethostname() not in health
    assert first.returncode == 1 and took < 10, (first.returncode, took, err)
    (said,) = re.findall("^kimi-jax: .*", err, re.M)
    assert said.startswith(f"kimi-jax: process 1 of 2 (host {socket.gethostname()}) is lost"), err


def test_flags_of_several_processes_go_together(folder, capsys):
    for flags, reason in ((["--distributed"], "needs --mesh"), (["--process-id", "1"], "go with --distributed")):
        assert cli.main(["serve", str(folder), *flags]) == 1
        assert reason in capsys.readouterr().err
