"""`kimi-jax agent` with an engine that answers by a list: tools, pictures, what is shown where, exit codes."""

import json
import re

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


def test_the_answer_and_the_steps_are_shown_apart_and_the_trace_is_written(answering, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("COLUMNS", "80")
    engine = answering(SUM, "The tool says 374.</think>The sum is 374.")
    pictures = [argument for number in ("58", "316") for argument in ("--image", small.picture(number))]
    assert agent(*pictures, "--tool", "add", "--greedy", "--trace-out", tmp_path / "run.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == "The sum is 374.\n"
    shown = re.sub(r"\x1b\[[0-9;]*m", "", err)
    assert '│ I see 58 and 316.\n→ add {"a": 58, "b": 316}\n← 374\n│ The tool says 374.\n' in shown
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["why"], len(list(tmp_path.glob("*.png")))) == ("stop", "answer", 2)
    assert len(engine.requests[0].media.grids) == 2 and engine.requests[0].sampling.temperature == 0


def test_public_functions_of_a_file_are_tools_and_a_limit_has_its_exit_code(answering, tmp_path, capsys):
    file = tmp_path / "sums.py"
    file.write_text("from os.path import join\ndef _no(): ...\ndef add(a: int, b: int) -> int:\n    return -a - b\n")
    for flags, result in ((["--yes"], "-374"), ([], "Error: add runs only where a person says yes, and nobody can be")):
        answering(SUM, SUM)
        with pytest.raises(SystemExit) as exit_:
            agent("--tool", file, "--steps", 2, "--json", *flags)
        out, err = capsys.readouterr()
        events = [json.loads(line) for line in out.splitlines()]
        (content,) = [event["content"] for event in events if event["event"] == "result"]
        assert content.startswith(result) and exit_.value.code == 3
        assert (events[0]["event"], events[-1]["event"], events[-1]["why"]) == ("run", "stop", "steps")
        assert err.endswith("stopped by its limit: steps, after 2 steps\n")


def test_the_task_is_a_word_of_the_command_line(answering, tmp_path, capsys):
    folder = str(small.path("k25-digits"))
    for words in (["What // how?"], [folder, "What // how?"], [folder, "--prompt", "What // how?"]):
        engine = answering("</think>So.")
        assert main(["agent", *words]) == 0
        assert capsys.readouterr().out == "So.\n"
        assert "What // how?" in engine.tokenizer.decode(list(engine.requests[0].tokens))
    for words, found in [
        ([], "the task is missing"),
        ([folder], "the task is missing"),
        (["http://host"], "the task is missing"),
        ([folder, "One", "--prompt", "Two"], "given twice"),
        (["file://host/a", "One"], "expected file://"),
    ]:
        assert main(["agent", *words]) == 1 and found in capsys.readouterr().err


def test_a_swarm_has_its_own_limits(answering, tmp_path, capsys):
    create = call("functions.create_subagent:0", json.dumps({"name": "a", "system_prompt": "You add."}))
    assign = call("functions.assign_task:1", json.dumps({"agent": "a", "prompt": "Add."}))
    answering(*(f"</think>{section(one)}" for one in (create, assign)), "</think>3", "</think>The sum is 3.")
    flags = ["--concurrency", 3, "--time", "10m", "--sub-steps", 2]
    assert agent("--swarm", *flags, "--trace-out", tmp_path / "run.jsonl") == 0
    assert capsys.readouterr().out == "The sum is 3.\n"
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    limits = [event["limits"] for event in events if event["event"] == "run"]
    assert [one["steps"] for one in limits] == [15, 2]
    assert (limits[0]["concurrency"], limits[0]["time"], limits[0]["sub_steps"]) == (3, 600.0, 2)
    assert agent("--concurrency", 3, "--sub-steps", 2) == 1
    assert "--sub-steps, --concurrency: for a swarm, with --swarm" in capsys.readouterr().err
    assert agent("--heavy", 2, "--seed", 5) == 1
    assert "--seed: the runs of --heavy N have the seeds 0 to N - 1" in capsys.readouterr().err


def test_heavy_merges_runs_and_a_failure_of_all_is_an_error(answering, capsys):
    answering("</think>3", "</think>3", "</think>The sum is 3.")
    assert agent("--heavy", 2) == 0
    assert capsys.readouterr().out == "The sum is 3.\n"
    answering()
    assert agent("--heavy", 2) == 1
    assert "none of 2 runs has an answer" in capsys.readouterr().err


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
        (["--tool", "subtract"], "--tool subtract: expected add, python, files:DIR or a Python file"),
        (["--tool", "add", "--tool", "add"], "two tools have the name 'add'"),
        (["--trace-out", __file__], "File exists"),
    ]:
        assert agent(*arguments) == 1 and found in capsys.readouterr().err
    server = ["agent", "http://host", "--prompt", "a"]
    assert main(server) == 1 and "--model" in capsys.readouterr().err
    assert main([*server, "--model", "b", "--mesh", "1x2", "--seed", "0"]) == 1
    assert "--mesh, --seed: for a model in this process" in capsys.readouterr().err
