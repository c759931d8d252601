"""Strangers' templates are programs: bounded in time, memory and depth, from any thread, and gone with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat_cases import folder, user

from kimi_jax.text import chat, template_child, template_process
from kimi_jax.text.template_process import RenderError, TemplateProcess

NOW = "2026-01-02T03:04:05"


@pytest.fixture
def process():
    process = TemplateProcess()
    yield process
    process.close()


MEMORY = [
    "{{ 'a' * 10000000000 }}",
    "{{ ([1] * 10000000000)|length }}",
    "{{ 'a'|center(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'a\nb'|indent(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{% set n = namespace(s='aaaaaaaa') %}"
    "{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s|length }}",
]
DEPTH = [
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for m in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% set n = namespace(a=[]) %}{% for i in range(5000) %}{% set n.a = [n.a] %}{% endfor %}{{ n.a | tojson }}",
]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        *((template, "needs more than 1024 MiB") for template in MEMORY),
        *((template, "nests or recurses too deep|brought its process down") for template in DEPTH),
        ("{{ 'a' * 40000000 }}", "writes too long a prompt"),
        ("{% for i in range(1000000000) %}{% endfor %}", "does not take these messages: OverflowError: Range too big"),
        ("{{ 10**5000 }}", "does not compile: ValueError: Exceeds the limit"),
        ("{{ '\\ud800' }}", "writes half of a surrogate pair"),
        ("{{ strftime_now(1) }}", "does not take these messages: TypeError"),
        ("{% if %}", "does not compile"),
    ],
)  # fmt: skip
def test_limits(process: TemplateProcess, template: str, message: str):
    with pytest.raises(RenderError, match=f"^({message})"):
        process.render(template, {}, NOW)
    assert process.render("{{ a }}", {"a": "é"}, NOW) == "é"


def test_the_clock_of_the_processor(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    quick = tmp_path / "quick.py"
    source = Path(template_child.__file__).read_text()
    quick.write_text(source.replace("\nMAX_SECONDS = 4", "\nMAX_SECONDS = 0"))
    monkeypatch.setattr(template_child, "__file__", str(quick))
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RenderError, match=r"^takes more than 4 seconds$"):
        process.render(loops, {}, NOW)
    assert process.render("on", {}, NOW) == "on"


def test_the_clock_on_the_wall(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch):
    process.render("", {}, NOW)
    monkeypatch.setattr(template_process, "MAX_WALL_SECONDS", 0.2)
    with pytest.raises(RenderError, match=r"^takes more than 4 seconds$"):
        process.render("{{ 9**(9**9) }}", {}, NOW)
    monkeypatch.setattr(template_process, "MAX_WALL_SECONDS", 30)
    assert process.render("on", {}, NOW) == "on"


def test_too_much_to_send(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_process, "MAX_FRAME", 100)
    with pytest.raises(RenderError, match=r"gets 1,\d+ bytes of messages and tools, at most 100 are taken"):
        process.render("", {"a": "a" * 1000}, NOW)


def test_the_time_it_is_told(process: TemplateProcess):
    assert process.render("{{ strftime_now('%Y %H') }}", {}, NOW) == "2026 03"


def test_from_any_thread_and_over_a_crash(process: TemplateProcess):
    def work(number: int) -> str:
        if number % 9 == 4:
            with pytest.raises(RenderError, match="needs more"):
                process.render("{{ 'a' * 10000000000 }}", {}, NOW)
        return process.render("{{ n }}", {"n": number}, NOW)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(40))) == [str(number) for number in range(40)]


def test_a_child_that_was_killed_is_replaced(process: TemplateProcess):
    process.render("", {}, NOW)
    child = process._child
    assert child is not None
    child.kill()
    child.wait()
    with pytest.raises(RenderError, match="brought its process down"):
        process.render("a", {}, NOW)
    assert process.render("a", {}, NOW) == "a"


def test_no_process_where_python_cannot_be_started(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_process.sys, "executable", "/bin/false")
    with pytest.raises(RenderError, match="cannot be rendered: /bin/false ended with 1"):
        process.render("a", {}, NOW)


SCRIPT = """
import os, sys
from kimi_jax.text import template_process as t
assert t.shared.render("a", {}, "2026-01-01") == "a"
print(t.shared._child.pid, flush=True)
if os.fork() == 0:  # a fork has a child of its own, and does not end its parent's
    assert t.shared.render("b", {}, "2026-01-01") == "b"
    t.shared.close()
    os._exit(0)
assert os.wait()[1] == 0
assert t.shared.render("c", {}, "2026-01-01") == "c"
print("ready", flush=True)
if sys.argv[1] == "stay":
    sys.stdin.read()
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" in status.read_text()  # ended, and not yet waited for by its new parent


@pytest.mark.parametrize("how", ["end", "stay"])
def test_no_orphans(how: str):
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == b"ready\n"
    if how == "stay":
        assert not gone(child)
        parent.send_signal(signal.SIGKILL)
    errors = parent.communicate()[1]
    assert errors == b""
    deadline = time.monotonic() + 10
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(child)


def test_errors_are_one_line_that_names_the_folder(tmp_path: Path):
    cases = {
        "{{ raise_exception('\x1b[31mred\n') }}": r"does not take these messages: \\x1b\[31mred\\n$",
        "{{ raise_exception('a' * 1000000) }}": "does not take these messages: a+ ",
        "{{ raise_exception(messages) }}": "does not take these messages: ",
    }
    for template, message in cases.items():
        with pytest.raises(ValueError, match=rf"{tmp_path.name}: the chat template {message}") as refused:
            chat.render([user("a")], model=folder(tmp_path, template))
        assert len(str(refused.value)) < 400


def test_renderings_share_a_process_and_leave_no_thread(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch):
    started, start = [], template_process._start
    monkeypatch.setattr(template_process, "_start", lambda: started.append(start()) or started[-1])
    threads = threading.active_count()
    assert [process.render("{{ a }}", {"a": i}, NOW) for i in range(20)] == [str(i) for i in range(20)]
    assert len(started) == 1
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)  # a cancelled timer ends at once, one that is not waits for the limit on rendering
    assert threading.active_count() <= threads
