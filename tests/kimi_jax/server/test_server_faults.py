"""Clients that leave or mean harm, engines that fail, and servers that stop: each is told, and the rest goes on."""

import base64
import errno
import functools
import io
import json
import resource
import socket
import struct
import sys
import threading
import time
import zlib

import httpx
import pytest
from fake_engine import FakeEngine

from kimi_jax import cli
from kimi_jax.server import Limits, watched
from kimi_jax.server.listener import MAX_CONNECTIONS

NAME = "kimi-toy"
BODY = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
JSON = {"content-type": "application/json"}


def until(condition, seconds=5.0):
    """Waits for a condition. Raises AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def events(lines):
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def stream(served, path="/v1/chat/completions", **fields):
    return served.http.stream("POST", path, json=BODY | {"stream": True} | fields)


def never_ends(engine):
    engine.answer, engine.pause = lambda request: lambda tokens: 40, 0.002


def test_the_row_of_a_client_that_left_is_freed(served):
    never_ends(served.engine)
    closed = served.engine.closed_streams
    for path, fields, count in (
        ("/v1/chat/completions", {}, 1),
        ("/v1/messages", {}, 2),
        ("/v1/chat/completions", {"n": 3}, 5),
    ):
        with stream(served, path, max_tokens=500, **fields) as answer:
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(12)]  # the last choices begin after the first
        until(functools.partial(lambda expected: len(closed) == expected, count))
    with pytest.raises(httpx.ReadTimeout):  # and where nothing was sent yet
        served.http.post("/v1/chat/completions", json=BODY | {"max_tokens": 500}, timeout=0.1)
    until(lambda: len(closed) == 6)
    assert all(len(one.tokens) < 400 for one in closed)


def test_sixteen_streams_of_which_five_are_cut_off_lose_nothing(served):
    call = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    arguments = json.dumps({"text": "word " * 30})
    served.engine.text = f"Hm.</think>{call}{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    served.engine.pause = 0.001
    tools = [{"type": "function", "function": {"name": "f"}}]
    found: dict[int, str] = {}

    def use(number):
        with httpx.Client(base_url=served.listener.url) as http:
            body = BODY | {"stream": True, "tools": tools}
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                text = ""
                for data in (line[6:] for line in answer.iter_lines() if line.startswith("data: {")):
                    if number < 5 and len(text) > 20 * number:
                        return
                    if number == 5:
                        time.sleep(0.01)
                    (choice,) = json.loads(data)["choices"]
                    for one in choice["delta"].get("tool_calls", ()):
                        text += one["function"]["arguments"]
                found[number] = text

    users = [threading.Thread(target=use, args=(number,)) for number in range(16)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert found == dict.fromkeys(range(5, 16), arguments)
    until(lambda: len(served.engine.closed_streams) == 16)


def test_a_stream_without_news_is_kept_open(served, monkeypatch):
    monkeypatch.setattr(watched, "PING_SECONDS", 0.02)
    served.engine.pause, served.engine.text = 0.1, "</think>"
    with stream(served) as answer:
        assert ": ping" in list(answer.iter_lines())
    with stream(served, "/v1/messages", max_tokens=5) as answer:
        assert {"type": "ping"} in [json.loads(line) for line in events(answer.iter_lines())]


def test_a_client_that_takes_nothing_is_given_up(served, monkeypatch):
    monkeypatch.setattr(watched, "PING_SECONDS", 0.02)
    monkeypatch.setattr(watched, "STALLED_SECONDS", 0.05)
    served.engine.answer = lambda request: lambda tokens: 40
    served.service.backend.max_length = served.engine.sizes.max_length = 10**6
    fields = {"stream": True, "max_tokens": 100_000, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(BODY | fields).encode()
    with socket.create_connection(("127.0.0.1", served.listener.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        until(lambda: served.engine.closed_streams, 20.0)
    assert not served.engine.closed_streams[0].cancelled and len(served.engine.closed_streams[0].tokens) < 100_000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_an_engine_that_fails_ends_the_stream_with_an_error(served, path):
    never_ends(served.engine)
    with stream(served, path, max_tokens=500) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        served.engine.error = "the engine has failed: /secret/path"
        last = json.loads(events(lines)[-1])
    assert last["error"]["type"] in ("server_error", "api_error") and "secret" not in last["error"]["message"]
    answer = served.http.post(path, json=BODY | {"max_tokens": 5})
    assert answer.status_code == 500 and "secret" not in answer.text
    served.engine._closed = True
    answer = served.http.post(path, json=BODY | {"max_tokens": 5})
    assert answer.status_code == 503 and "secret" not in answer.text
    assert served.http.get("/health").status_code == 503


def test_a_fault_of_the_server_says_nothing_of_its_inside(served, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(type(served.service.backend), "prompt", fails)
    answer = served.http.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 500 and "secret" not in answer.text and "secret" in caplog.text


class FullDisk(io.StringIO):
    """A file that takes nothing."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk_ends_no_request_and_no_server(serve, monkeypatch):
    monkeypatch.setattr(sys, "stderr", FullDisk())
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with cli.serve._log():
        served = serve(Limits(log_requests=True))
        assert served.http.post("/v1/chat/completions", json=BODY).status_code == 200
        served.engine.error = "x"
        assert served.http.post("/v1/chat/completions", json=BODY).status_code == 500
    cli.serve._note("stopped")
    cli.serve._write("serving", sys.stdout)


def test_a_lost_process_of_the_mesh_is_said_and_ends_what_runs(serve):
    served = serve()
    never_ends(served.engine)
    with stream(served, max_tokens=500) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        served.service.fail("process 1 of 2 (host secret) is lost")
        *_, last = events(lines)
    health = served.http.get("/health")
    assert '"error"' in last and health.status_code == 503
    assert "process of the model's mesh is lost" in health.text and "secret" not in last + health.text


def test_a_server_that_stops_finishes_or_cuts_what_runs(serve, processor):
    for pause, cut in ((0.001, False), (0.05, True)):
        engine = FakeEngine(processor, "</think>" + "word " * 40)
        engine.pause = pause
        served = serve(engine=engine)
        with stream(served, max_tokens=400) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            served.service.stopping = True
            assert served.listener.stop(0.3 if cut else 10.0, engine.close) is not cut
            *_, last = events(lines)
        assert "stopping" in last if cut else last == "[DONE]"
        with pytest.raises(httpx.ConnectError):
            served.http.get("/health")


def test_clients_have_a_number_of_requests_at_one_time(serve):
    served = serve(Limits(per_client=1))
    never_ends(served.engine)
    with stream(served, max_tokens=500) as answer:
        lines = answer.iter_lines()  # (whose end would close the stream)
        assert next(lines)
        refused = served.http.post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert served.http.get("/health").status_code == 200


def png(width, height):
    """Returns a PNG of a size that it only says it has."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def big_picture():
    url = "data:image/png;base64," + base64.b64encode(png(30_000, 30_000)).decode()
    return json.dumps(BODY | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]})


ATTACKS = {
    "braces": lambda: b"{" * 10_000_000,
    "brackets": lambda: b"[" + b"[]," * 3_000_000,
    "deep": lambda: b'{"model":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep schema": lambda: json.dumps(BODY)[:-1] + ', "tools": ' + '[{"a":' * 90 + "1" + "}]" * 90 + "}",
    "twice": lambda: b'{"model": "kimi-toy", "model": "x"}',
    "nan": lambda: json.dumps(BODY | {"temperature": float("nan")}),
    "half a pair": lambda: b'{"model": "\\ud800"}',
    "no text": lambda: b"\xff\xfe",
    "list": lambda: b"[]",
    "large number": lambda: b'{"seed": ' + b"9" * 5_000 + b"}",
    "picture": big_picture,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_bodies_that_mean_harm_are_refused(served, name):
    answer = served.http.post("/v1/chat/completions", content=ATTACKS[name](), headers=JSON, timeout=30.0)
    assert answer.status_code == 400 and len(answer.text) < 2_000
    assert served.http.get("/health").status_code == 200 and not served.engine.requests


def test_pages_of_other_origins_reach_nothing(served):
    # A browser sends such a body unasked, and reads a name that leads here as its own origin
    assert served.http.post("/v1/chat/completions", content=json.dumps(BODY)).status_code == 415
    assert served.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert served.http.options("/v1/chat/completions", headers={"origin": "http://evil.example"}).status_code == 405
    assert "access-control-allow-origin" not in served.http.get("/v1/models").headers
    for path in ("/../../etc/passwd", "/v1/models/../../x", "/nothing"):
        assert served.http.get(path).status_code == 404


@pytest.fixture
def many_files():
    """Allows this process both ends of 1,000 connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4_096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", [200, pytest.param(1_000, marks=pytest.mark.slow)])
def test_headers_that_do_not_come_and_many_connections_leave_the_server_free(served, monkeypatch, many_files, count):
    monkeypatch.setattr("kimi_jax.server.listener.HEADER_SECONDS", 0.3 if count < 1_000 else 3.0)
    clients = [socket.create_connection(("127.0.0.1", served.listener.port)) for _ in range(count)]
    clients[0].sendall(b"GET /health HTTP/1.1\r\nhost: x")
    assert served.http.get("/health").status_code == 200
    for client in clients:
        client.settimeout(5.0)
        assert client.recv(1) == b""
        client.close()
    assert served.http.get("/health").status_code == 200


@pytest.mark.slow
def test_connections_beyond_the_most_are_turned_away_and_the_server_answers_afterwards(served, monkeypatch, many_files):
    monkeypatch.setattr("kimi_jax.server.listener.HEADER_SECONDS", 5.0)
    clients = [socket.create_connection(("127.0.0.1", served.listener.port)) for _ in range(MAX_CONNECTIONS)]
    with httpx.Client(base_url=served.listener.url) as late:
        assert late.get("/health").status_code == 503
    for client in clients:
        client.close()

    def answers():
        with httpx.Client(base_url=served.listener.url) as later:
            return later.get("/health").status_code == 200

    until(answers)


@pytest.mark.parametrize("value", ["a\r\nset-cookie: x=y", "a\n\nHTTP/1.1 200 OK", "a\0b"])
def test_what_a_request_says_becomes_no_header_of_an_answer(served, value):
    for head in (f"GET /v1/models/{value} HTTP/1.1\r\n", f"GET /v1/models HTTP/1.1\r\nx-api-key: {value}\r\n"):
        with socket.create_connection(("127.0.0.1", served.listener.port)) as client:
            client.sendall(head.encode() + b"host: localhost\r\nconnection: close\r\n\r\n")
            client.settimeout(5.0)
            with client.makefile("rb") as file:
                said = file.read()
        assert said.startswith(b"HTTP/1.1 ") and said.count(b"HTTP/1.1 ") == 1 and b"set-cookie" not in said.lower()
    answer = served.http.post("/v1/chat/completions", json=BODY | {"model": value})
    assert answer.status_code == 404 and "set-cookie" not in answer.headers
    assert served.http.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    served = serve(Limits(body_seconds=0.1))
    with socket.create_connection(("127.0.0.1", served.listener.port)) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n")
        client.sendall(b"content-type: application/json\r\n\r\n{")
        assert b" 408 " in client.recv(100)
