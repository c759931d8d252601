"""The Python tool: names that live on, what its box contains, calls that are too long, and nothing left at the end."""

import ast
import asyncio
import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kimi_jax import agents
from kimi_jax.agents import python_process, python_tool
from kimi_jax.agents.box import find_box, why_not
from kimi_jax.agents.python_process import RESTARTED, Interpreter

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(why_not(kind)), reason=why_not(kind) or "works"))
    for kind in ("bwrap", "unshare")
]
HAS_BOX = pytest.mark.skipif(find_box()[0] == "none", reason=find_box()[1] or "works")


def cells(kind, *codes):
    """Returns the results of calls in one interpreter, failures in words."""

    async def main():
        interpreter = Interpreter(kind)
        found = []
        for code in codes:
            try:
                found.append(await interpreter.run(code))
            except agents.ToolError as error:
                found.append(f"Error: {error}")
        await interpreter.close()
        return found

    return asyncio.run(main())


def left_of(session):
    """Returns how many processes of a session are alive; one that is dead may wait for init to take note."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True).stdout
    return sum(sid == str(session) and not stat.startswith("Z") for sid, stat in map(str.split, listed.splitlines()))


# It stops by itself, so that a box that does not hold it fails a test and not the machine
FORKS = "import os\nn = 0\nwhile n < 200:\n    if os.fork() == 0:\n        import time; time.sleep(100)\n    n += 1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_contains_the_code_and_the_next_call_works(kind):
    found = cells(
        kind,
        "x = 3\nimport socket\nsocket.socket().connect(('1.1.1.1', 53))",
        "socket.socket().connect(('127.0.0.1', 22))",
        "open('/etc/passwd').read()",
        "import os; sorted(name for name in ('home', 'tmp', 'proc', 'sys', 'var') if os.path.exists(f'/{name}'))",
        "os.listdir('/tmp'), os.getcwd(), sorted(os.environ), os.listdir('.'), os.path.exists('/old/etc')",
        "open('/usr/anything', 'w')",
        "import ctypes; ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "bytearray(3 << 30)",
        "open('large', 'wb').truncate(257 << 20)",
        "import sys; sys.stdin.read()",
        FORKS,
        "x, n < 64, open('kept', 'w').write('file'), os.remove('large')",
    )
    ends = [one.strip().splitlines()[-1] for one in found]
    assert ends[0] == "OSError: [Errno 101] Network is unreachable"
    assert ends[1].startswith(("OSError: [Errno 101]", "ConnectionRefusedError", "OSError: [Errno 99]"))
    assert ends[2].startswith("FileNotFoundError")
    # Where this Python is in /tmp, the folders above it are seen, too
    above = {Path(one).relative_to("/tmp").parts[0] for one in sys.path if one.startswith("/tmp/")}
    assert ends[3] == "['tmp']" and ends[4].endswith(", '/box', ['HOME', 'LANG', 'PATH'], [], False)")
    assert set(ast.literal_eval(ends[4])[0]) <= above
    assert ends[5].startswith("OSError: [Errno 30] Read-only") and ends[6] == "-1" and ends[7] == "MemoryError"
    assert ends[8].startswith("OSError: [Errno 27]") and ends[9] == "''"
    assert ends[10].startswith("BlockingIOError") and ends[11] == "(3, True, 4, None)"


def test_the_last_value_is_shown_and_errors_with_their_line(monkeypatch):
    assert cells(
        "none",
        "print('a')\nx = [1]\nx",
        "None",
        "_",
        "def f():\n    return 1 / 0\nf()",
        "1 +",
        "exit()",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: n: int\npickle.loads(pickle.dumps(A(3)))",
    ) == [
        "a\n[1]\n",
        "",
        "[1]\n",
        "Traceback (most recent call last):\n"
        '  File "<cell 4>", line 3, in <module>\n    f()\n'
        '  File "<cell 4>", line 2, in f\n    return 1 / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n",
        '  File "<cell 5>", line 1\n    1 +\n       ^\nSyntaxError: invalid syntax\n',
        'Traceback (most recent call last):\n  File "<cell 6>", line 1, in <module>\n    exit()\n'
        '  File "<frozen _sitebuiltins>", line 26, in __call__\nSystemExit: None\n',
        "A(n=3)\n",
    ]


def test_an_interpreter_that_ends_is_told_and_the_next_call_has_a_new_one():
    found = cells(
        "none", "x = 1\nprint('so far')\nimport os; os._exit(3)", "'x' in globals()", "import os; os.close(3)"
    )
    assert found[0] == "Error: the interpreter ended, exit code 3. so far\n" and found[1] == f"{RESTARTED}False\n"


def test_much_output_is_cut_in_the_middle(monkeypatch):
    monkeypatch.setattr(python_process, "OUTPUT", 10)
    assert cells("none", "print('a' * 30 + 'b' * 30)", "1") == [
        "a" * 10 + "\n[... 41 bytes left out]\n" + "b" * 9 + "\n",
        "1\n",
    ]


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# Stands for the library, whose import takes seconds
PYPLOT = f"""
import os, sys; os.mkdir("matplotlib"); open("matplotlib/__init__.py", "w").close(); sys.path.insert(0, os.getcwd())
open("matplotlib/pyplot.py", "w").write('''
import base64
class Figure:
    def savefig(self, file, format): file.write(base64.b64decode("{png()}"))
numbers = [1]
get_fignums, figure, close = lambda: numbers, lambda number: Figure(), lambda which: numbers.clear()
''')
import matplotlib.pyplot as plt
print("drawn")
"""


def call(code):
    return agents.Reply(None, calls=(agents.Call("", "python", json.dumps({"code": code})),))


def results(done):
    return [message["content"] for message in done.messages if message["role"] == "tool"]


def run(script, **settings):
    return results(asyncio.run(agents.Agent(agents.ScriptedModel(script), [agents.python(**settings)]).run("task")))


@HAS_BOX
def test_figures_are_pictures_and_a_call_that_is_too_long_ends():
    script = [call(PYPLOT), call("while True: pass"), call("'plt' in globals()"), agents.Reply("done")]
    parts, late, gone = found = run(script, timeout=2.0)
    assert parts[0] == {"type": "text", "text": "drawn\n"} and len(parts) == 2, found
    assert parts[1]["image_url"]["url"] == f"data:image/png;base64,{png()}"
    assert late == "Error: python took longer than 2 s" and gone == f"{RESTARTED}False\n"


@HAS_BOX
def test_each_conversation_has_an_interpreter_of_its_own():
    def answer(messages, tools):
        rounds = sum(one["role"] == "tool" for one in messages)
        if messages[0]["content"] == "Count.":
            return call("x = 'x' in globals()\nx") if rounds == 0 else agents.Reply(messages[-1]["content"])
        made = [
            agents.Call("", "create_subagent", '{"name": "a", "system_prompt": "Count."}'),
            *(agents.Call("", "assign_task", json.dumps({"agent": "a", "prompt": str(n)})) for n in range(2)),
        ]
        one = made[:1] if rounds == 0 else made[1:]
        return agents.Reply(None, calls=tuple(one)) if rounds < 2 else agents.Reply("done")

    swarm = agents.swarm(agents.ScriptedModel(answer), [agents.python()], system="Direct.")
    assert results(asyncio.run(swarm.run("task")))[1:] == ["False\n", "False\n"]


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_cancelling_ends_the_process_even_where_it_ignores_the_first_signal(kind, monkeypatch):
    monkeypatch.setattr(python_process, "GRACE", 0.2)
    code = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.fork()\ntime.sleep(100)"

    async def main():
        interpreter = Interpreter(kind)
        session = None
        task = asyncio.create_task(interpreter.run(code))
        while interpreter._process is None:
            await asyncio.sleep(0.01)
        session = interpreter._process.pid
        await asyncio.sleep(0.5)
        running = left_of(session)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return running, left_of(session)

    running, left = asyncio.run(main())
    assert running >= 1 and left == 0


def test_an_interpreter_that_cannot_be_started_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(python_process.tempfile, "tempdir", str(tmp_path))

    async def main():
        interpreter = Interpreter("none")
        with monkeypatch.context() as patch:
            patch.setattr(python_process, "box_command", lambda *_: [str(tmp_path / "gone")])
            with pytest.raises(agents.ToolError, match=r"^no interpreter can be started: .*No such file"):
                await interpreter.run("1")
        assert not list(tmp_path.iterdir())
        assert await interpreter.run("6 * 7") == "42\n"  # the next call tries again
        await interpreter.close()

    asyncio.run(main())


def test_without_a_box_the_tool_is_refused_unless_unsafe(monkeypatch):
    monkeypatch.setattr(python_tool, "find_box", lambda: ("none", "bwrap is not installed; unshare fails: no"))
    with pytest.raises(
        RuntimeError, match=r"^no box .* works here, and unsafe is not given: bwrap is not installed; u"
    ):
        agents.python()
    assert run([call("6 * 7"), agents.Reply("done")], unsafe=True) == ["42\n"]
    assert agents.python(unsafe=True).asks
