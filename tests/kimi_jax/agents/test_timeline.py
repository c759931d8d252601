"""Traces read back: counts of agents, the longest chain, files that are cut off, and `kimi-jax trace`."""

import asyncio
import json
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from kimi_jax import agents
from kimi_jax.agents.timeline import read_timeline
from kimi_jax.cli import main


def calls(*made):
    usage = agents.Usage(100, 80, 10)
    return agents.Reply(None, calls=tuple(agents.Call("", n, json.dumps(v)) for n, v in made), usage=usage)


@agents.tool
def look(key: str) -> str:
    """Looks a key up."""
    if key == "x":
        raise OSError("gone")
    return key


def answer(messages, tools):
    made = sum(one["role"] == "assistant" for one in messages)
    if messages[0]["content"] == "You look up.":
        times = int(messages[1]["content"])
        return calls(("look", {"key": f"x{made}"[: 1 + (made > 0)]})) if made < times else agents.Reply("found")
    tasks = [("assign_task", {"agent": "finder", "prompt": times}) for times in ("1", "3", "2")]
    create = ("create_subagent", {"name": "finder", "system_prompt": "You look up."})
    return [calls(create), calls(*tasks), calls(tasks[0]), agents.Reply("all")][made]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    agent = agents.swarm(agents.ScriptedModel(answer, 0.001), [look])
    run = asyncio.run(agent.run("task", trace=agents.Trace(path)))
    return path, run


def test_a_timeline_has_the_runs_own_counts(trace):
    path, run = trace
    found = read_timeline(path)
    assert found.is_whole
    assert [(one.stage, len(one.steps)) for one in found.agents.values()] == [(0, 4), (2, 2), (2, 4), (2, 3), (3, 2)]
    assert found.critical_steps == run.critical_steps == 10
    assert found.critical_path == ["main", "finder#2", "finder#4"]
    assert sum((one.usage for one in found.agents.values()), agents.Usage()) == run.usage
    main, second = found.agents["main"], found.agents["finder#2"]
    assert (len(main.calls), len(second.calls), second.failed, second.stop) == (5, 3, 1, "answer")
    for record in found.agents.values():
        spans = record.steps + record.calls
        assert all(record.begin - 1e-3 <= begin <= end <= record.end for begin, end in spans)


def test_every_beginning_of_a_trace_can_be_read_and_drawn(trace, tmp_path, capsys):
    text = trace[0].read_text()
    lines = text.splitlines(keepends=True)
    for kept in range(1, len(lines)):
        found = read_timeline(write(tmp_path, "".join(lines[:kept])))
        assert not found.is_whole and sum(len(one.steps) for one in found.agents.values()) == sum(
            json.loads(line)["event"] == "step" for line in lines[:kept]
        )
        assert all(one.begin <= begin <= end <= one.end for one in found.agents.values() for begin, end in one.calls)
    cut = write(tmp_path, text[:-20])
    assert main(["trace", str(cut)]) == 0
    out, err = capsys.readouterr()
    assert "still at work" in out
    assert err == "the trace does not reach the end of the run\n"


def test_heavy_runs_are_launched_before_the_merge():
    def answer(messages, tools):
        made = sum(one["role"] == "assistant" for one in messages)
        return calls(("look", {"key": str(made)})) if made < 2 and tools else agents.Reply("found")

    with tempfile.TemporaryDirectory() as folder:
        trace = agents.Trace(Path(folder) / "run.jsonl")
        done = asyncio.run(agents.heavy(agents.Agent(agents.ScriptedModel(answer), [look]), "task", 3, trace=trace))
        found = read_timeline(Path(folder) / "run.jsonl")
    assert found.is_whole and found.critical_steps == done.critical_steps == 4
    assert found.critical_path == ["main", max("run#0", "run#1", "run#2", key=lambda name: found.agents[name].end)]


def write(tmp_path, text):
    path = tmp_path / "cut.jsonl"
    path.write_text(text)
    return path


def test_what_is_no_trace_is_refused(tmp_path, capsys):
    event = {"t": 0, "agent": "main", "parent": None, "event": "step"}
    for text, found in [
        ("{\n", "line 1"),
        ('{"a": 1}\n', "line 1: expected an event with t, agent"),
        (json.dumps(event | {"t": "1"}) + "\n", "expected an event"),
        (json.dumps(event) + "\n", "line 1: the event step has no 's'"),
        ("", "the trace has no events"),
    ]:
        assert main(["trace", str(write(tmp_path, text))]) == 1
        assert found in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none")]) == 1
    assert main(["trace", str(write(tmp_path, "[]\n"))]) == 1 and "line 1" in capsys.readouterr().err


def test_the_table_has_all_agents(trace, capsys):
    assert main(["trace", str(trace[0])]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert "5 agents, 10 steps in the longest chain (*)" in out and err == ""
    assert rows["main"][1:8] == ["*", "4", "5", "0", "300", "80%", "30"]
    assert rows["finder#2"][1:8] == ["*", "4", "3", "1", "300", "80%", "30"]
    assert rows["all"][1:7] == ["15", "12", "4", "1,000", "80%", "100"]


def test_the_picture_is_written_whole_or_not_at_all(trace, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("run.png", "run.svg"):
        assert main(["trace", str(trace[0]), "--plot", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size == (1200, 336)
    svg = (tmp_path / "run.svg").read_text()
    # (The names of the longest chain's agents, which are drawn as paths, are marked as well)
    assert svg.rstrip().endswith("</svg>") and svg.count('<g style="fill: #d9480f"') == 3
    with pytest.raises(SystemExit):
        main(["trace", str(trace[0]), "--plot", "run.gif"])
    assert "ends in .png or .svg" in capsys.readouterr().err
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    assert main(["trace", str(trace[0]), "--plot", str(tmp_path / "other.png")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run.png", "run.svg"}
