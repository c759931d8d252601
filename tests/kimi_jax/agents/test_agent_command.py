"""`kimi-jax agent` with an engine that answers by a list: tools, pictures, what is shown where, exit codes."""

import json

import pytest
from answer_cases import call, section

import checkpoints
from kimi_jax import small
from kimi_jax.cli import main
from kimi_jax.processor import Processor

SUM = f"I see 58 and 316.</think>{section(call('functions.add:0', json.dumps({'a': 58, 'b': 316})))}"


@pytest.fixture
def answering(monkeypatch, list_engine):
    """Returns a function that makes the engine of the command answer with texts."""
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: None)

    def answer(*texts):
        engine = list_engine(Processor.from_folder(small.path("k25-digits")), *texts)
        monkeypatch.setattr("kimi_jax.engine.Engine", lambda model, **options: engine)
        return engine

    return answer


def agent(*arguments):
    return main(["agent", "--model", "digits", "--prompt", "Add the numbers.", *map(str, arguments)])


def test_the_answer_and_the_steps_are_shown_apart_and_the_trace_is_written(answering, tmp_path, capsys):
    engine = answering(SUM, "The tool says 374.</think>The sum is 374.")
    pictures = [argument for number in ("58", "316") for argument in ("--image", small.picture(number))]
    assert agent(*pictures, "--tool", "add", "--greedy", "--trace-out", tmp_path / "run.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == "The sum is 374.\n"
    assert '  I see 58 and 316.\n→ add {"a": 58, "b": 316}\n← 374\n  The tool says 374.\n' in err
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["why"], len(list(tmp_path.glob("*.png")))) == ("stop", "answer", 2)
    assert len(engine.requests[0].media.grids) == 2 and engine.requests[0].sampling.temperature == 0


def test_public_functions_of_a_file_are_tools_and_a_limit_has_its_exit_code(answering, tmp_path, capsys):
    file = tmp_path / "sums.py"
    file.write_text("from os.path import join\ndef _no(): ...\ndef add(a: int, b: int) -> int:\n    return -a - b\n")
    answering(SUM, SUM)
    with pytest.raises(SystemExit) as exit_:
        agent("--tool", file, "--steps", 2)
    err = capsys.readouterr().err
    assert exit_.value.code == 3 and "← -374\n" in err and "stopped by its limit: steps, after 2 steps" in err


@pytest.mark.parametrize(
    ("written", "found"),
    [(None, "no such file"), ("1/0", "ZeroDivisionError"), ("a = 1", "no public function"), ("def f(x): ...", "x is")],
)
def test_a_file_without_tools_is_refused(tmp_path, capsys, written, found):
    file = tmp_path / "tools.py"
    if written is not None:
        file.write_text(written)
    assert agent("--tool", file) == 1
    assert found in capsys.readouterr().err


def test_misuse_is_refused(tmp_path, capsys):
    for arguments, found in [
        (["--tool", "subtract"], "--tool subtract: expected add, or a Python file"),
        (["--tool", "add", "--tool", "add"], "two tools have the name 'add'"),
        (["--trace-out", __file__], "File exists"),
    ]:
        assert agent(*arguments) == 1 and found in capsys.readouterr().err
    server = ["agent", "http://host", "--prompt", "a"]
    assert main(server) == 1 and "--model" in capsys.readouterr().err
    assert main([*server, "--model", "b", "--mesh", "1x2", "--seed", "0"]) == 1
    assert "--mesh, --seed: for a model in this process" in capsys.readouterr().err
