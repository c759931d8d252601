"""`kimi-jax serve` with the small trained model: from loading to right answers, and to its end by SIGTERM."""

import base64
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

from kimi_jax import cli, small


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


DIGITS = str(small.path("k25-digits"))


def asked(text, *numbers):
    """Returns a message of a user, with pictures of numbers."""
    urls = (base64.b64encode(small.picture(number).read_bytes()).decode() for number in numbers)
    shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}} for url in urls]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def test_a_model_is_served_until_sigterm(capfd):
    port = free_port()
    said: dict = {"before": set()}

    def use():
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                while (status := health(http)) != 200:
                    said["before"].add(status)
                    time.sleep(0.02)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                fields = {"model": "k25-digits", "temperature": 0}
                read = [asked("What number is in the picture?", "427")]
                said["whole"] = client.chat.completions.create(messages=read, **fields)
                said["chunks"] = list(client.chat.completions.create(messages=read, stream=True, **fields))
                said["cut"] = client.chat.completions.create(messages=read, max_tokens=4, **fields)
                form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [427, 42]}}}
                said["form"] = client.chat.completions.create(messages=read, response_format=form, **fields)
                add, tools = [asked("Add the numbers.", "58", "316")], [small.ADD_TOOL]
                called = client.chat.completions.create(messages=add, tools=tools, **fields).choices[0]
                said["called"] = called
                result = {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "374"}
                chain = [*add, called.message.model_dump(exclude_none=True), result]
                said["sum"] = client.chat.completions.create(messages=chain, tools=tools, **fields).choices[0].message
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def health(http):
        try:
            return http.get("/health").status_code
        except httpx.TransportError:
            return None

    user = threading.Thread(target=use)
    user.start()
    sizes = ["--slots", "1", "--cache-memory", "4MB", "--prefill-chunk", "64", "--max-model-len", "300"]
    code = cli.main(["serve", DIGITS, "--port", str(port), "--log-requests", *sizes])
    user.join()
    out, log = capfd.readouterr()
    assert code == 0 and 503 in said["before"]
    lines = out.splitlines()
    assert lines[0] == f"serving k25-digits at http://127.0.0.1:{port}/v1"
    curl = shlex.split(lines[1])
    assert (
        curl[:2] == ["curl", f"http://127.0.0.1:{port}/v1/chat/completions"]
        and json.loads(curl[-1])["model"] == "k25-digits"
    )
    assert lines[2] == f"chat at http://127.0.0.1:{port}/"
    assert "loaded " in log and "programs in " in log and log.rstrip().endswith("stopped")
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {line["path"] for line in lines} == {"/health", "/v1/chat/completions"} and "picture" not in log
    whole = said["whole"].choices[0].message
    assert (whole.reasoning_content, whole.content) == ("I see 4, 2 and 7.", "427")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said["chunks"]) == "427"
    assert said["cut"].usage.completion_tokens == 4 and said["cut"].choices[0].finish_reason == "length"
    assert json.loads(said["form"].choices[0].message.content) == 427
    (call,) = said["called"].message.tool_calls
    assert said["called"].finish_reason == "tool_calls" and call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 58, "b": 316}
    assert (said["sum"].reasoning_content, said["sum"].content) == ("The tool says 374.", "The sum is 374.")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "from 0 to 65,535"),
        (["--sampling", "wild"], "invalid choice"),
        (["--grace", "-1"], "from 0"),
    ],
)
def test_flags_out_of_range_are_refused(capsys, flags, said):
    with pytest.raises(SystemExit):
        cli.main(["serve", DIGITS, *flags])
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_said_in_words(capsys):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        assert cli.main(["serve", DIGITS, "--port", str(one.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err
