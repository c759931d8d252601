"""`kimi-jax serve` with a real model and engine: from loading to an answer, and to its end by SIGTERM."""

import json
import os
import shlex
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from checkpoints.toy import toy_config, write_toy
from kimi_jax import cli


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Returns the folder of a K2 of two layers, whose programs compile in a second each."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8, "first_k_dense_replace": 1}
    return write_toy(tmp_path_factory.mktemp("command") / "toy", toy_config("k2", **sizes))


def test_a_model_is_served_until_sigterm(small_folder, capfd):
    port = free_port()
    said: dict = {"before": set()}

    def use():
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                while (status := health(http)) != 200:
                    said["before"].add(status)
                    time.sleep(0.02)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                fields = {"model": "toy", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
                said["whole"] = client.chat.completions.create(max_tokens=4, **fields)
                said["chunks"] = list(client.chat.completions.create(max_tokens=4, stream=True, **fields))
                form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [True, "no"]}}}
                said["form"] = client.chat.completions.create(max_tokens=20, response_format=form, **fields)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def health(http):
        try:
            return http.get("/health").status_code
        except httpx.TransportError:
            return None

    user = threading.Thread(target=use)
    user.start()
    sizes = ["--slots", "1", "--cache-memory", "1MB", "--prefill-chunk", "16", "--max-model-len", "300"]
    code = cli.main(["serve", str(small_folder), "--port", str(port), "--log-requests", *sizes])
    user.join()
    out, log = capfd.readouterr()
    assert code == 0 and 503 in said["before"]
    lines = out.splitlines()
    assert lines[0] == f"serving toy at http://127.0.0.1:{port}/v1"
    curl = shlex.split(lines[1])
    assert (
        curl[:2] == ["curl", f"http://127.0.0.1:{port}/v1/chat/completions"] and json.loads(curl[-1])["model"] == "toy"
    )
    assert lines[2] == f"chat at http://127.0.0.1:{port}/"
    assert "loaded " in log and "programs in " in log and log.rstrip().endswith("stopped")
    asked = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {line["path"] for line in asked} == {"/health", "/v1/chat/completions"} and "Hello" not in log
    whole = said["whole"]
    assert whole.usage.completion_tokens == 4 and whole.choices[0].finish_reason == "length"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in said["chunks"])
    assert streamed == whole.choices[0].message.content
    assert json.loads(said["form"].choices[0].message.content) in (True, "no")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "from 0 to 65,535"),
        (["--sampling", "wild"], "invalid choice"),
        (["--grace", "-1"], "from 0"),
    ],
)
def test_flags_out_of_range_are_refused(small_folder, capsys, flags, said):
    with pytest.raises(SystemExit):
        cli.main(["serve", str(small_folder), *flags])
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_said_in_words(small_folder, capsys):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        assert cli.main(["serve", str(small_folder), "--port", str(one.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err
