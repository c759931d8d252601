"""Ends of commands: every error in one line, warnings too, signals, and a reader that goes away."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from calls import refused

import checkpoints
from checkpoints.jobs.compare import Finding
from kimi_jax.cli import main
from kimi_jax.cli.terminal import escaped, print_line

KIMI = (sys.executable, "-m", "kimi_jax.cli")


@pytest.fixture
def failing(monkeypatch):
    """Makes `kimi-jax inspect` raise an error."""

    def fail(error):
        def summary(path):
            raise error

        monkeypatch.setattr(checkpoints, "summary", summary)

    return fail


@pytest.mark.parametrize(
    "error",
    [
        RecursionError("too deep"),
        TypeError("unhashable"),
        OverflowError("too large"),
        AssertionError(),
        StopIteration(),
        ZeroDivisionError("division by zero"),
        KeyError("hidden_size"),
        RuntimeError("INVALID_ARGUMENT: shapes"),
        SyntaxError("not a PNG file"),
        ExceptionGroup("several", [ValueError("one")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_expected_is_one_line_and_says_how_to_see_more(failing, capsys, error):
    failing(error)
    line = refused(capsys, main(["inspect", "."]))
    assert line.startswith(f"kimi-jax: unexpected {type(error).__name__}: ")
    assert line.endswith("; this is a fault in kimi-jax, --trace shows where")
    assert str(error.args[0] if error.args else type(error).__name__) in line and "'hidden_size'" not in line


def test_the_trace_is_shown_when_it_is_asked_for_and_does_not_steer_the_terminal(failing, capsys):
    failing(TypeError("red \x1b[31m text"))
    assert main(["inspect", ".", "--trace"]) == 1
    first, *trace = capsys.readouterr().err.splitlines()
    assert first.startswith("kimi-jax: unexpected TypeError: red \\x1b[31m text; ")
    assert trace[0].startswith("Traceback") and trace[-1] == "TypeError: red \\x1b[31m text"
    assert any("test_failures.py" in line for line in trace)


def test_memory_that_runs_out_is_told_without_taking_more(failing, capfd):
    failing(MemoryError())
    assert main(["inspect", "."]) == 1
    assert capfd.readouterr().err.startswith("kimi-jax: out of memory on this machine")
    failing(RuntimeError("RESOURCE_EXHAUSTED: 3 GB on device 0"))
    assert main(["inspect", "."]) == 1
    assert capfd.readouterr().err == "kimi-jax: out of memory on a device: RESOURCE_EXHAUSTED: 3 GB on device 0\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("tensor a\x1b[2J\nb\u202ec is bad"), "kimi-jax: tensor a\\x1b[2J b\\u202ec is bad"),
        (OSError(28, "No space left on device", "a\x07b"), "kimi-jax: a\\x07b: No space left on device"),
        (OSError(18, "Cross-device link", "a", None, "b"), "kimi-jax: a -> b: Cross-device link"),
        (ValueError(), "kimi-jax: ValueError"),
    ],
)
def test_an_error_of_ours_is_escaped(failing, capsys, error, line):
    failing(error)
    assert refused(capsys, main(["inspect", "."])) == line


def test_a_message_is_cut(failing, capsys):
    for error in (ValueError("x" * 10**6), TypeError("x" * 10**6), OSError(2, "none", "x" * 10**6)):
        failing(error)
        assert len(refused(capsys, main(["inspect", "."]))) < 1000
    with pytest.raises(SystemExit):
        main(["inspect", ".", "\x1b[31m" + "x" * 10**6])
    err = capsys.readouterr().err
    assert len(err) < 2000 and "\x1b" not in err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_on_standard_error(monkeypatch, capsys):
    def summary(path):
        warnings.warn("name\x1b[31m\n" + "y" * 10**6, stacklevel=1)
        raise ValueError("no more")

    monkeypatch.setattr(checkpoints, "summary", summary)
    assert main(["inspect", "."]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("kimi-jax: warning: name\\x1b[31m yyy") and len(warning) < 1000
    assert error == "kimi-jax: no more"


def test_signals(failing, monkeypatch, capsys):
    failing(KeyboardInterrupt())
    assert main(["inspect", "."]) == 130
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checkpoints, "summary", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["inspect", "."])
        assert exit_.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--preset", "kimi-linear-48b"]])
def test_a_reader_that_has_gone_is_no_failure(arguments, unbuffered):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([*KIMI, *arguments], stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_pipe_that_broke_elsewhere_is_a_failure(failing, capsys):
    failing(BrokenPipeError(32, "Broken pipe"))
    assert "Broken pipe" in refused(capsys, main(["inspect", "."]))


def test_a_full_disk_under_standard_output_is_a_failure(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = main(["inspect", "--preset", "kimi-linear-48b"])
        monkeypatch.undo()
    assert "No space left on device" in refused(capsys, code)


def test_help_does_not_wait_for_jax():
    program = "import sys; from kimi_jax.cli import main; sys.exit(bool({'jax', 'numpy', 'flax'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_lines_for_a_terminal(capsys):
    print_line("a\x1b[2Jb\nc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\nc\n"
    assert escaped("a\tb\n\x1b]0;title\x07 \x9b31m é \u200d") == "a\tb\n\\x1b]0;title\\x07 \\x9b31m é \u200d"


def test_names_of_strangers_are_escaped_in_findings(monkeypatch, capsys):
    finding = Finding("a\x1b[31mb", "differs")
    monkeypatch.setattr(checkpoints, "verify", lambda *_, **__: checkpoints.Verdict((finding,)))
    assert main(["verify", "."]) == 1
    assert capsys.readouterr().out == "a\\x1b[31mb differs\n"
    assert main(["verify", ".", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["name"] == "a\x1b[31mb"
