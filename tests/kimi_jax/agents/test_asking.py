"""Questions before a tool runs: at a terminal, and where there is none."""

import asyncio
import io
import os
import sys

import pytest
from rich.console import Console

from kimi_jax import agents
from kimi_jax.agents.tools import run_tool
from kimi_jax.cli.dialogue.asking import Asker
from kimi_jax.cli.tools import with_permission


def work(code: str, n: int = 1) -> str:
    """Works."""
    return code * n


TOOL = agents.Tool(**vars(agents.tool(work)) | {"asks": True, "timeout": 0.5})


@pytest.fixture
def terminal(monkeypatch):
    """Returns the master's end of a terminal that standard input is."""
    master, slave = os.openpty()
    with open(slave, closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield master
    os.close(master)


async def answered(master, *answers, calls=({"code": "ab"},), typed_before=b""):
    """Runs the calls at once, answers each question, and returns results and what is on the screen."""
    log = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60)
    os.write(master, typed_before)
    (guarded,) = with_permission([TOOL], Asker(log, {"work"}))
    tasks = [asyncio.create_task(run_tool(guarded, arguments)) for arguments in calls]
    for number, answer in enumerate(answers, 1):
        async with asyncio.timeout(30):
            while log.file.getvalue().count("no and why> ") < number:
                await asyncio.sleep(0.001)
        if answer is None:
            tasks[0].cancel()
        else:
            os.write(master, answer)
    return await asyncio.gather(*tasks, return_exceptions=True), log.file.getvalue()


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ([b"y\n"], "ab"),
        ([b"what\n", b"\n", b"YES\n"], "ab"),
        ([b"n\n"], "the person refused this call"),
        ([b"n: use the other\n"], "the person refused this call"),
        ([b"n use the other\n"], "the person refused this call: use the other"),
        ([b"\x04"], "the person refused this call"),
    ],
)
def test_answers(terminal, answers, result):
    if answers[0].startswith(b"n:"):
        answers = [*answers, b"n\n"]  # no answer that is known, so the question comes again
    (found,), shown = asyncio.run(answered(terminal, *answers))
    assert str(found) == result and isinstance(found, str if result == "ab" else agents.ToolError)
    assert shown.startswith("work wants to run with\n│ code: ab\n")
    assert shown.count("no and why> ") == len(answers)


def test_always_holds_for_the_next_calls_and_questions_come_one_by_one(terminal):
    calls = [{"code": str(number)} for number in range(4)]
    found, shown = asyncio.run(answered(terminal, b"y\n", b"n\n", b"a\n", calls=calls))
    assert [str(one) for one in found] == ["0", "the person refused this call", "2", "3"]
    assert shown.count("wants to run") == 3


def test_the_whole_call_is_shown_without_what_steers_a_terminal(terminal):
    code = "x = 1\n\x1b[2J\u202eevil" + "y" * 5_000
    (_,), shown = asyncio.run(answered(terminal, b"n\n", calls=[{"code": code, "n": 2}]))
    assert "│ code:\n│ x = 1\n│ \\x1b[2J\\u202eevil" in shown and "y" * 5_000 in shown and "│ n: 2\n" in shown


def test_what_was_typed_before_answers_nothing_and_waiting_takes_none_of_the_tools_time(terminal):
    async def slow():
        answer = asyncio.create_task(answered(terminal, b"y\n", typed_before=b"n\n"))
        return await answer

    (found,), shown = asyncio.run(slow())
    assert found == "ab" and shown.count("no and why> ") == 1
    assert with_permission([TOOL], Asker(Console(), {"work"}))[0].timeout is None


def test_an_interrupted_question_leaves_nothing_behind(terminal):
    (found,), shown = asyncio.run(answered(terminal, None))
    assert isinstance(found, asyncio.CancelledError) and shown.endswith("no and why> \n")


def test_without_a_terminal_the_model_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    (guarded,) = with_permission([TOOL], Asker(Console(file=io.StringIO(), force_terminal=True), {"work"}))
    with pytest.raises(agents.ToolError, match="work runs only where a person says yes, and nobody can be asked here"):
        asyncio.run(run_tool(guarded, {"code": "a"}))
    (freed,) = with_permission([TOOL], Asker(Console(file=io.StringIO()), set()))
    assert asyncio.run(run_tool(freed, {"code": "a"})) == "a"
