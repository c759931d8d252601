"""A file of prompts: each line's answer is the one that it has alone, a stop loses none, a bad line ends alone."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

import kimi_jax
from checkpoints.toy import toy_config, write_toy
from kimi_jax import offline
from kimi_jax.engine import Engine
from kimi_jax.engine.requests import Event, Usage
from kimi_jax.processor import Processor
from kimi_jax.runtime.sampling import Sampling


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Returns the engine and processor of a K2 of one layer of experts."""
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    folder = write_toy(tmp_path_factory.mktemp("offline") / "k2", toy_config("k2", **sizes))
    with Engine(kimi_jax.load(folder, dtype=jnp.float32), slots=2, cache_memory="4MiB", prefill_chunk=64) as engine:
        yield engine, Processor.from_folder(folder)


def answers(served, path, done=(), part=(0, 1), **options):
    async def collect():
        defaults = offline.Defaults(Sampling(), max_new_tokens=4)
        lines = offline.read_lines(path, done, part)
        return [result async for result in offline.answer_lines(*served, lines, defaults, **options)]

    return asyncio.run(collect())


def write(path: Path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_each_line_has_the_answer_that_it_has_alone(served, tmp_path):
    file = write(
        tmp_path / "prompts.jsonl",
        {"id": "a", "prompt": "Hello"},
        {"messages": [{"role": "user", "content": "Hello"}], "max_new_tokens": 2},
        "\n",
        {"id": "drawn", "prompt": "Hello", "temperature": 1.5, "seed": 7},
    )
    results = {result["id"]: result for result in answers(served, file)}
    model = served[0].model
    expected = kimi_jax.answer(model, "Hello", max_new_tokens=4, sampling=Sampling())
    assert results["a"]["content"] == expected.content and results["a"]["finish_reason"] == expected.finish_reason
    assert expected.content.startswith(results["1"]["content"]) and results["1"]["usage"]["completion_tokens"] == 2
    drawn = kimi_jax.answer(model, "Hello", max_new_tokens=4, sampling=Sampling(1.5), seed=7)
    assert results["drawn"]["content"] == drawn.content != expected.content


class Says(Engine):
    """An engine of one slot that gives an answer without a model."""

    failure = None

    def __init__(self, tokens, finish):
        self.event = Event(tuple(tokens), finish, Usage(1, len(tokens), 0))

    def stats(self):
        return SimpleNamespace(slots=1)

    async def submit(self, request):
        yield self.event


def test_calls_of_tools_are_part_of_a_result(served, tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = write(tmp_path / "prompts.jsonl", {"prompt": "Hello", "tools": tools})
    call = "<|tool_calls_section_begin|><|tool_call_begin|>0<|tool_call_argument_begin|>{}"
    ids = served[1].tokenizer.encode("<think>Hm.</think>Look." + call)
    for engine_finish, finish in (("stop", "tool_calls"), ("length", "length")):
        (result,) = answers((Says(ids, engine_finish), served[1]), file)
        assert (result["reasoning"], result["content"], result["finish_reason"]) == ("Hm.", "Look.", finish)
        assert result["tool_calls"] == [
            {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ]


def test_results_come_in_order_on_request_and_a_part_at_a_time(served, tmp_path):
    lines = [{"id": str(i), "prompt": "x", "max_new_tokens": 1 + (5 - i) ** 2} for i in range(6)]
    file = write(tmp_path / "prompts.jsonl", *lines)
    assert [result["id"] for result in answers(served, file, in_order=True)] == list("012345")
    parts = [answers(served, file, part=(index, 2)) for index in range(2)]
    assert [sorted(result["id"] for result in part) for part in parts] == [list("024"), list("135")]


def test_a_stop_loses_no_result_and_repeats_none(tmp_path):
    out = write(tmp_path / "out.jsonl", {"id": "a", "content": "é"}, {"id": "b", "error": "no"}, '{"id": "c", "cont')
    ids, file = offline.open_results(out)
    with file:
        file.write(offline.result_line({"id": "c"}))
    assert ids == {"a", "b"}
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b", "c"]
    prompts = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": ""}, {"id": "c", "prompt": ""})
    assert [line.id for line in offline.read_lines(prompts, ids)] == ["c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{\n", "line 1: not JSON"),
        ({"prompt": 3}, "prompt is '3'"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"id": "a"}, "either prompt or messages"),
        ({"prompt": "a", "temprature": 1}, "'temprature'"),
        ({"prompt": "a", "seed": True}, "seed is 'True'"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "max_new_tokens": 10**8}, "new ones"),
        ({"messages": [{"role": "king"}]}, "king"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/passwd"}]}]}, "none"),
    ],
)
def test_a_bad_line_ends_alone(served, tmp_path, line, message):
    file = write(tmp_path / "prompts.jsonl", line, {"id": "good", "prompt": "Hello"})
    results = {result["id"]: result for result in answers(served, file)}
    (bad,) = (result for name, result in results.items() if name != "good")
    assert message in bad["error"] and "\n" not in bad["error"]
    assert results["good"]["finish_reason"] in ("stop", "length")


def test_a_failed_engine_writes_no_results(tmp_path, served, monkeypatch):
    # (a result would keep the line from being answered after a new start)
    engine, processor = served

    class Failed:
        failure = RuntimeError("the device is gone")
        stats = engine.stats

        def submit(self, request):
            return self.events()

        async def events(self):
            yield Event((), "error", Usage(1, 0, 0), None, "the engine has failed: the device is gone")

    file = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "Hello"})
    with pytest.raises(RuntimeError, match="the device is gone"):
        answers((Failed(), processor), file)
