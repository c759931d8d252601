"""The Python of README and of every page of docs runs as it stands: a page's blocks in their order, in one namespace.

A generator of `GIVEN` yields the names that a page takes as given (an engine, say), beside a checkpoint in the folder
"toy"; then it is sent the page's names and what was printed, and checks them.
"""

import ast
import asyncio
import gc
import importlib
import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from doc_blocks import PAGES, ROOT, blocks
from fake_engine import FakeEngine

import kimi_jax
from checkpoints.toy import head_config, toy_config, write_toy

# Pages whose Python another test runs, beside what it needs
ELSEWHERE = {
    "add-a-family.md": "kimi_jax/families/test_add_a_family.py",
    "clients.md": "kimi_jax/server/test_serving_docs.py",
}
# What a test of its own runs: a line of the block
SEVERAL_PROCESSES = "with joined() as links:"
PACKAGES = ("checkpoints", "kimi_jax", "pallas_kernels", "sharding")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "n_routed_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Returns the folder of a K2 of two layers, one of them with experts."""
    return write_toy(tmp_path_factory.mktemp("docs") / "toy", toy_config("k2", **SIZES))


def python(page):
    """Returns the blocks of Python of a page, but for the one that several processes run."""
    return [block for block in blocks(page) if block.language == "python" and SEVERAL_PROCESSES not in block.text]


def run(page, names):
    """Runs the blocks of a page, those that await something in one event loop."""
    codes = [
        compile("\n" * (block.line - 1) + block.text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for block in python(page)
    ]

    async def everything():
        for code in codes:
            waiting = eval(code, names)
            if code.co_flags & inspect.CO_COROUTINE:
                await waiting

    if any(code.co_flags & inspect.CO_COROUTINE for code in codes):
        asyncio.run(everything())
    else:  # in no event loop: a page may start one
        for code in codes:
            eval(code, names)


def agents(toy):
    from kimi_jax import agents

    processor = kimi_jax.Processor.from_folder(toy)
    call = (
        "A sum.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a":58,"b":316}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    )

    def answer(request):
        prompt = processor.tokenizer.decode(request.tokens)
        asks = "58 + 316" in prompt and "374" not in prompt
        ids = processor.tokenizer.encode(call if asks else "Done.</think>The sum is 374.<|im_end|>")
        return lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else None

    engine = FakeEngine(processor, max_length=4000)
    engine.answer = answer
    Path("servers.json").write_text('{"mcpServers": {}}')
    runs, agent_run = [], agents.Agent.run

    async def noted(agent, *args, **options):
        runs.append(await agent_run(agent, *args, **options))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.Agent, "run", noted)
        names, _ = yield {"engine": engine, "processor": processor}
    assert [run.stop for run in runs] == ["answer", "answer"] and [run.steps for run in runs] == [2, 1]
    assert all("374" in run.answer for run in runs)
    assert isinstance(names["swarm"], agents.Agent)


def chat(toy):
    _, out = yield {}
    assert out.startswith("I need data. One moment. tool_calls\n[{'id': 'functions.weather:0',")
    assert "start: section\n" in out and "start: content\n" in out


def draft_heads(toy):
    values = json.loads((toy / "config.json").read_text())
    write_toy("k3-head", head_config(values, "eagle3-mla", max_position_embeddings=512))
    model, prompts = kimi_jax.load(toy, dtype=jnp.float32), np.arange(8)[None]  # in bf16 near ties go either way
    names, _ = yield {"model": model, "prompts": prompts}
    np.testing.assert_array_equal(names["tokens"], kimi_jax.generate(model, prompts))
    assert names["engine"].stats().pages > 0
    names["engine"].close()


def engine(toy):
    from llguidance import LLMatcher
    from llguidance.tiktoken import lltokenizer_from_encoding

    names, out = yield {}
    result, answer = names["result"], out.splitlines()
    assert result.finish_reason == "length" and len(result.tokens) == 24
    assert answer[0].startswith(f"{result.tokens} length ") and answer[-1].endswith(" length")
    # The provider of the page holds an answer to what its matcher allows
    processor = kimi_jax.Processor.from_folder(toy)
    words, tokenizer = processor.config.text.vocab_size, processor.tokenizer
    guidance = lltokenizer_from_encoding(tokenizer.encoding, n_vocab=words, eos_token=[tokenizer.eos_id])
    provider = names["Grammar"](LLMatcher(guidance, "start: /ab/ | /abba/", log_level=0), words)
    request = kimi_jax.Request([1, 2], max_new_tokens=9, mask_provider=provider)

    async def read():
        return [token async for event in FakeEngine(processor, "xyz").submit(request) for token in event.tokens]

    assert tokenizer.decode(asyncio.run(read())) in ("ab", "abba")


def readme(toy):
    names, out = yield {}
    prompt, model = names["prompt"], names["model"]
    assert names["logits"].shape == (*prompt.tokens.shape, model.config.text.vocab_size)
    # The two ways give one answer, the right one
    assert out == "I see 4, 2 and 7. 427\n427\n"
    said = list(names["answer"].token_ids)
    assert names["new"][0, : len(said)].tolist() == said


def small_models(toy):
    _, out = yield {}
    assert out == "I see 4, 2 and 7. 427\n"


def terminal(toy):
    names, out = yield {}
    hidden, heads = SIZES["hidden_size"], SIZES["num_attention_heads"]
    assert out == f"(1, 3, {hidden}) (1, {heads}, 3, 3)\n"
    assert names["guess"].shape == (1, 3, names["model"].config.text.vocab_size)


def training(toy):
    _, out = yield {}
    losses = [float(line.split()[1]) for line in out.splitlines()]
    assert len(losses) == 10 and losses[0] == pytest.approx(6.67, abs=0.02) and losses[-1] < 5.2


GIVEN = {
    "README.md": readme,
    "small-models.md": small_models,  # after README, whose programs it runs
    "agents.md": agents,
    "chat.md": chat,
    "draft-heads.md": draft_heads,
    "engine.md": engine,
    "terminal.md": terminal,
    "training.md": training,
}
SLOW = ("draft-heads.md", "engine.md", "training.md")


# Clients that a page leaves open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in GIVEN]
)
def test_the_python_of_a_page_runs_as_it_stands(name, toy, tmp_path, monkeypatch, capsys):
    (page,) = (page for page in PAGES if page.name == name)
    (tmp_path / "toy").symlink_to(toy)
    monkeypatch.chdir(tmp_path)
    around = GIVEN[name](toy)
    names = next(around)
    run(page, names)
    with pytest.raises(StopIteration):
        around.send((names, capsys.readouterr().out))
    del names, around
    gc.collect()  # here, where warnings of what is left open are expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_piece_of_python_is_run_by_a_test(page):
    """Python that a slow test runs is compiled here, and what it imports of this repository is there."""
    for block in blocks(page):
        if block.language != "python":
            continue
        if page.name in ELSEWHERE:
            test = (ROOT / "tests" / ELSEWHERE[page.name]).read_text()
            assert f'"{page.name}"' in test and "exec(compile(code" in test
        else:
            assert page.name in GIVEN, f"{page.name}:{block.line}: no test runs this Python"
        tree = compile(block.text, str(page), "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"


# Each compiles a dozen programs in both processes
@pytest.mark.slow
def test_the_python_for_several_processes_runs_on_two(toy, tmp_path):
    """They learn who they are from the environment that Slurm gives the processes of a job."""
    (block,) = (block for block in blocks(ROOT / "docs" / "engine.md") if SEVERAL_PROCESSES in block.text)
    script = tmp_path / "engine_on_two.py"
    script.write_text(f'FOLDER, SHAPE = {str(toy)!r}, "2x4"\n{block.text}')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": coordinator,  # Slurm's would have a port of the job's number
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    running = [
        subprocess.Popen(
            [sys.executable, script],
            env=environment | {"SLURM_PROCID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0]
    # the last line, after what the processes' network (Gloo) prints
    assert len(ast.literal_eval(outputs[0].splitlines()[-1])) == 24
    assert not outputs[1].rstrip().endswith("]")
