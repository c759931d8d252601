"""The `kimi-jax` command, in process: its output, on which stream, and its exit codes."""

import argparse
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import cases
import jax
import numpy as np
import pytest
from calls import answer, generate, refused, user
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file

import checkpoints
import kimi_jax
from checkpoints.toy import write_toy
from kimi_jax import config_json
from kimi_jax.cli import COMMANDS, GROUPS, command_parser, main, starting
from kimi_jax.cli.console import console
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.generate import Column
from sharding import default_shape, mesh_sizes

# --- convert and inspect ----------------------------------------------------------------------------------------------


def test_convert_inspect_and_generate_from_what_was_converted(published, kimi, tmp_path, capsys):
    target = tmp_path / "new" / "orbax"
    assert main(["convert", str(published), str(target)]) == 0
    out, err = capsys.readouterr()
    tensors = [n for file in published.glob("*.safetensors") for n in load_file(file) if not n.endswith("weight_shape")]
    assert f"{target}: {len(tensors)} tensors in " in out and err == ""
    assert main(["convert", str(published), str(target), "--json"]) == 0  # the second time it is there
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["whole"], event["made_bytes"]) == ("converted", True, 0)
    assert event["tensors"] == len(tensors) and event["found_bytes"] > 0
    tables = []
    for folder, kind in ((published, "safetensors"), (target, "orbax")):
        assert main(["inspect", str(folder)]) == 0
        table = capsys.readouterr().out
        title = f"kimi_k25 ({kind}): 1 x mla + dense, 1 x mla + moe, 1 vision layers, 4 experts, 2 chosen"
        assert title in " ".join(table.split())
        tables.append([line for line in table.splitlines() if line.startswith("│")])
    assert tables[0] == tables[1]
    assert any("routed experts" in line and f"{3 * 4 * 64 * 32:,}" in line for line in tables[0])
    # Then the converted folder answers as the published one does
    assert generate(target, "--prompt", "Hello", "--max-new-tokens", 6, "--dtype", "float32", "--greedy") == 0
    assert capsys.readouterr().out == answer(kimi, published, user("Hello"), max_new_tokens=6)[0]


def test_inspect_a_preset(capsys):
    assert main(["inspect", "--preset", "kimi-linear-48b"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "kimi_linear (configuration): 1 x kda + dense, 19 x kda + moe, 7 x mla + moe, 256 experts, 8 chosen" in out
    assert "49,12" in out  # weights: 49.12e9
    assert main(["inspect", "--preset", "kimi-k9"]) == 1
    assert capsys.readouterr().err.startswith("kimi-jax: no preset 'kimi-k9'; there are kimi-k2, ")


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_and_keeps_the_rest_for_stderr(published, kimi, loads, capsys):
    options = ("--dtype", "float32", "--max-new-tokens", 6, "--greedy")
    assert generate(published, "--prompt", "Hello", *options) == 0
    out, err = capsys.readouterr()
    expected, count = answer(kimi, published, user("Hello"), max_new_tokens=6)
    assert out == expected and len(out) > 3
    log = " ".join(err.split())
    tokens = kimi_jax.Processor.from_folder(published)("Hello").tokens
    assert f"the prompt has {tokens.shape[1]} tokens" in log and f" {count} tokens; the first after " in log
    assert log.startswith("loaded in ") and log.endswith("tokens per second")
    assert loads == [(published, None, "float32")]
    # Instant mode has another prompt
    assert generate(published, "--prompt", "Hello", "--no-thinking", *options) == 0
    assert capsys.readouterr().out == answer(kimi, published, user("Hello"), thinking=False, max_new_tokens=6)[0] != out


def test_generate_with_sampling(published, kimi, loads, capsys):
    flags = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7)
    assert generate(published, "--prompt", "Hello", "--dtype", "float32", "--max-new-tokens", 6, *flags) == 0
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    expected = [answer(kimi, published, user("Hello"), max_new_tokens=6, seed=seed, **sampling)[0] for seed in (7, 8)]
    assert capsys.readouterr().out == expected[0] != expected[1]


def test_flags_of_sampling_win_over_generation_config(damaged, kimi, loads, capsys):
    (damaged / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5, "top_k": 50}')
    options = ("--prompt", "Hello", "--max-new-tokens", 6)
    for flags, sampling in [
        ((), {"temperature": 1.5, "top_k": 50}),
        (("--top-k", 2), {"temperature": 1.5, "top_k": 2}),
        (("--temperature", 0), {"temperature": 0.0}),
    ]:
        assert generate(damaged, *options, *flags) == 0
        assert capsys.readouterr().out == answer(kimi, damaged, user("Hello"), max_new_tokens=6, **sampling)[0]


def test_without_flags_the_mode_says_how_tokens_are_drawn(published, kimi, loads, monkeypatch, capsys):
    options = ("--prompt", "-", "--dtype", "float32", "--max-new-tokens", 6, "--seed", 3)
    for flags, thinking, temperature in (((), True, 1.0), (("--no-thinking",), False, 0.6)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
        assert generate(published, *options, *flags) == 0
        drawn = {"temperature": temperature, "top_p": 0.95, "seed": 3, "max_new_tokens": 6}
        assert capsys.readouterr().out == answer(kimi, published, user("Hello"), thinking=thinking, **drawn)[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "standard input is empty" in refused(capsys, generate(published, *options))


def test_reasoning_goes_to_a_terminal_and_the_answer_to_the_pipe(published, loads, monkeypatch, capsys):
    tokenizer = kimi_jax.Tokenizer.from_folder(published)
    ids = tokenizer.encode("I think.</think>It is so.", allow_special=True)
    columns = [Column(np.array([token]), np.array([Finish.NOT_YET])) for token in ids]
    monkeypatch.setattr("kimi_jax.runtime.generate.stream", lambda *_, **__: iter(columns))
    terminal = Console(file=sys.stderr, force_terminal=True, width=60)
    plain = console()
    monkeypatch.setattr("kimi_jax.cli.console.console", lambda stderr=False, quiet=False: terminal if stderr else plain)
    assert generate(published, "--prompt", "Hello") == 0
    out, err = capsys.readouterr()
    assert out == "It is so.\n" and "│ I think." in re.sub(r"\x1b\[[0-9;]*m", "", err) and "It is so" not in err


# With a head each step is another program
@pytest.mark.parametrize("draft", ["prompt-lookup", pytest.param("head", marks=pytest.mark.slow)])
def test_generate_with_drafts(published, kimi, loads, tmp_path, capsys, monkeypatch, draft):
    monkeypatch.chdir(tmp_path)
    assert main(["make-toy", "head", "--head-for", str(published), "--head", "eagle3-llama"]) == 0
    capsys.readouterr()
    options = ("--prompt", "Hello", "--dtype", "float32", "--max-new-tokens", 6, "--greedy")
    assert generate(published, *options, "--draft", draft, "--draft-tokens", 3) == 0
    out, err = capsys.readouterr()
    said = re.search(r"(\d+) of (\d+) drafted tokens were right \(\d+%\), [0-9.]+ of each of (\d+) drafts", err)
    assert out == answer(kimi, published, user("Hello"), max_new_tokens=6)[0] and said is not None
    assert draft != "head" or (int(said[3]) >= 2 and int(said[2]) > int(said[3]))


def test_generate_refuses_a_head_of_another_model_before_it_loads_its_own(published, loads, tmp_path, capsys):
    other = write_toy(tmp_path / "other", cases.eagle_config("eagle3-mla"))
    for draft, line in (
        (other, f"{other}/config.json: vocab_size is 288, but that of its target is "),
        (published, f"{published}: is a model, not a draft head"),
    ):
        assert line in refused(capsys, generate(published, "--prompt", "Hello", "--draft", draft))
    assert not loads


def test_generate_stops_at_a_stop_id(published, kimi, monkeypatch, capsys):
    # Given a model whose configuration names the third token of its usual answer as a stop
    processor = kimi_jax.Processor.from_folder(published)
    prompt = processor("Hello").tokens
    new = kimi_jax.generate(kimi, prompt, max_new_tokens=6, stop_ids=kimi.config.stop_ids)[0].tolist()
    assert new[2] not in new[:2]
    model = nnx.clone(kimi)
    model.config = dataclasses.replace(kimi.config, stop_ids=(new[2], *kimi.config.stop_ids[1:]))
    monkeypatch.setattr(checkpoints, "load", lambda *args, **kwargs: model)
    assert generate(published, "--prompt", "Hello", "--dtype", "float32", "--max-new-tokens", 6, "--greedy") == 0
    out, err = capsys.readouterr()
    assert out == processor.tokenizer.decode(new[:2]) + "\n" and "3 tokens; the first" in err


def test_an_answer_does_not_steer_a_terminal_and_reaches_a_pipe_as_it_is(published, loads, monkeypatch, capsys):
    monkeypatch.setattr("kimi_jax.text.StreamDecoder.push", lambda self, ids: "\x1b[31m\u200d\n")
    for is_terminal, shown in ((True, "\\x1b[31m\u200d\n\n"), (False, "\x1b[31m\u200d\n\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert generate(published, "--prompt", "Hello", "--max-new-tokens", 1) == 0
        assert capsys.readouterr().out == shown


def test_generate_looks_at_an_image_and_reads_a_chat(published, kimi, loads, picture, tmp_path, capsys):
    options = ("--dtype", "float32", "--max-new-tokens", 4, "--greedy")
    assert generate(published, "--prompt", "Describe.", "--image", picture, *options) == 0
    seen = capsys.readouterr().out
    image, text = {"type": "image_url", "image_url": {"url": str(picture)}}, {"type": "text", "text": "Describe."}
    messages = user([image, text])
    assert seen == answer(kimi, published, messages, max_new_tokens=4)[0]
    # The same conversation from a file, as a list and as an object with tools
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(messages))
    assert generate(published, "--chat", chat, *options) == 0
    assert capsys.readouterr().out == seen
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    chat.write_text(json.dumps({"messages": messages, "tools": tools}))
    assert generate(published, "--chat", chat, *options) == 0
    assert capsys.readouterr().out == answer(kimi, published, messages, tools=tools, max_new_tokens=4)[0] != seen


def test_mesh_and_dtype_go_to_load(published, loads, capsys):
    for flags in ([], ["--mesh", "2x4", "--dtype", "bfloat16"], ["--mesh", "auto"]):
        assert generate(published, "--prompt", "Hello", "--max-new-tokens", 1, *flags) == 0
        assert len(capsys.readouterr().out) > 1
    (plain, (_, mesh, dtype), (_, auto, _)) = loads
    assert plain == (published, None, None)
    assert (mesh.devices.shape, dtype) == ((2, 4, 1, 1), "bfloat16")
    heads = config_json.from_folder(published).text.num_attention_heads
    assert auto.devices.shape == default_shape(8, heads) and auto.shape["tensor"] > 1


# --- export, verify and make-toy --------------------------------------------------------------------------------------


SMALL = ("hidden_size=128", "intermediate_size=96", "moe_intermediate_size=64", "vocab_size=768", "q_lora_rank=48")
SMALL += (
    "kv_lora_rank=32",
    "qk_nope_head_dim=16",
    "qk_rope_head_dim=8",
    "v_head_dim=16",
    "num_attention_heads=4",
    "num_key_value_heads=4",
)


def make_toy(folder, *flags):
    fields = [part for field in SMALL for part in ("--set", field)]
    return main(["make-toy", str(folder), "--like", "k2", "--layers", "2", "--experts", "4", *fields, *flags])


def test_a_toy_is_made_converted_exported_and_verified(tmp_path, capsys):
    toy, orbax, exported = (str(tmp_path / name) for name in ("toy", "orbax", "back"))
    assert make_toy(toy, "--form", "fp8", "--shard-size", "300KB") == 0
    size = sum(file.stat().st_size for file in (tmp_path / "toy").iterdir())
    assert capsys.readouterr().out == f"{toy}: {size:,} bytes\n"
    assert len(list((tmp_path / "toy").glob("*.safetensors"))) > 1
    assert main(["convert", toy, orbax, "--experts", "int4", "--dtype", "float32"]) == 0
    assert main(["export", orbax, exported]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith(f"{exported}: ") and "bytes in 1 shards; carried along: config.json, generation_" in out

    assert main(["verify", orbax]) == main(["verify", orbax, exported]) == 0
    assert main(["verify", orbax, toy, "--tolerance", "0.08"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tensors, none differs from their checksums") and "none differs from" in lines[1]
    assert "none differs from" in lines[2] and "; the largest error is 0.07" in lines[2]
    assert main(["verify", orbax, toy, "--tolerance", "0.01"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12 and all(
        ".experts." in line and " is off by 0.0" in line for line in out.splitlines()
    )
    assert re.fullmatch(rf"kimi-jax: {orbax}: 12 of \d+ differ from {toy}\n", err)

    assert main(["verify", orbax, exported, "--json"]) == 0
    *events, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert last == {"event": "tensor", "name": last["name"], "problem": "", "max_error": 0.0, "rms_error": 0.0}
    assert events[0]["event"] == "verifying"


def test_a_damaged_chunk_is_named(published, tmp_path, capsys):
    assert main(["convert", str(published), str(tmp_path / "orbax")]) == 0
    (file,) = (tmp_path / "orbax" / "model.layers.1.mlp.experts.down_proj.weight_scale").glob("c.2*")
    data = bytearray(file.read_bytes())
    data[7] ^= 16
    file.write_bytes(data)
    capsys.readouterr()
    name = "language_model.model.layers.1.mlp.experts.2.down_proj.weight_scale"
    assert main(["verify", str(tmp_path / "orbax")]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{name} {file}: tensor {name} is not what was converted")
    assert "1 of " in err and "differ from their checksums" in err
    line = refused(capsys, main(["export", str(tmp_path / "orbax"), str(tmp_path / "out")]))
    assert str(file) in line and name in line
    line = refused(capsys, main(["generate", str(tmp_path / "orbax"), "--prompt", "a", "--verify"]))
    assert str(file) in line and name in line


def test_a_toy_of_a_published_folder(published, tmp_path, capsys):
    assert main(["make-toy", str(tmp_path / "cut"), "--from", str(published), "--layers", "1"]) == 0
    assert main(["verify", str(tmp_path / "cut"), str(published)]) == 1
    out = capsys.readouterr().out.splitlines()[1:]
    assert out and all(line.endswith(" is not in A") and ".layers.1." in line for line in out)
    line = refused(capsys, main(["make-toy", str(tmp_path / "x"), "--from", str(published), "--layers", "9"]))
    assert "num_hidden_layers cannot be 9: expected 1 to 2" in line
    line = refused(capsys, main(["make-toy", str(tmp_path / "x"), "--from", str(published), "--form", "fp8"]))
    assert "--form and --set go with --like" in line


# --- help and usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command.NAME, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    examples = out[out.index("\nexamples:\n") :]
    assert examples.count(f"kimi-jax {command.NAME}") >= 3


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for group, commands in GROUPS.items():
        listed = out[out.index(f"\n{group}\n") :]
        for command, phrase in commands.items():
            assert f"\n  {command.NAME:<11} {phrase}\n" in listed and len(phrase.split()) <= 8


def test_the_version_and_the_environment_are_shown(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and shown == f"kimi-jax {version('kimi-jax')}\n"
    monkeypatch.setenv("XLA_NOTE", "red \x1b[31m")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"  jax: {version('jax')}\n" in shown and "  cpu:7: cpu\n" in shown
    assert "red \\x1b[31m" in shown and "secret" not in shown
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["numpy"] == np.__version__


def test_a_shell_gets_a_script_that_knows_every_command(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (names,) = re.findall(r"_kimi_jax_subparsers=\((.*)\)", script)
    assert names.split() == [command.NAME for command in COMMANDS] and "--max-new-tokens" in script


def test_names_are_spelt_one_way_and_a_mistyped_one_gets_the_nearest(capsys):
    assert main(["inspect", "--preset", "kimi-linear"]) == main(["inspect", "--preset", "kimi-linear-48b"]) == 0
    first, second = capsys.readouterr().out.split("kimi_linear (configuration)")[1:]
    assert first.strip() == second.strip()
    assert "did you mean kimi-k2.5?" in refused(capsys, main(["inspect", "--preset", "kimi-k25"]))
    with pytest.raises(SystemExit):
        main(["make-toy", "folder", "--like", "k2-thinkin"])
    assert "did you mean kimi-k2-thinking?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"did you mean expert\?"):
        mesh_sizes("data=2,experts=4")


# --- starting ---------------------------------------------------------------------------------------------------------


def test_a_refusal_comes_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "model").mkdir()
    script = "import sys; from kimi_jax.cli import main; print(main(sys.argv[1:]), 'jax' in sys.modules)"
    for argv in (
        ["generate", "gone", "--prompt", "a"],
        ["generate", "model", "--prompt", "a", "--image", "gone.png"],
        ["generate", "model", "--prompts", "gone.jsonl"],
        ["generate", "model", "--prompt", "a", "--draft", "gone"],
        ["chat", "gone"],
        ["chat", "model", "--draft", "gone"],
        ["agent", "gone", "--prompt", "a"],
        ["agent", "model", "--prompt", "a", "--tool", "gone.py"],
        ["agent", "model", "--prompt", "a", "--image", "gone.png"],
        ["convert", "gone", "x"],
        ["inspect", "gone"],
        ["verify", "gone"],
        ["serve", "gone"],
        ["serve", "model", "--draft", "gone"],
        ["train", "gone", "--data", "x", "--out", "y"],
        ["demo", "--image", "gone.png"],
    ):
        done = subprocess.run([sys.executable, "-c", script, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == "1 False\n" and "gone" in done.stderr, argv


def test_programs_are_kept_in_the_users_cache_unless_a_flag_says_no(monkeypatch, tmp_path):
    set_to = {}
    config = SimpleNamespace(jax_enable_compilation_cache=True, jax_compilation_cache_dir=None)
    config.update = lambda name, value: (set_to.update({name: value}), setattr(config, name, value))
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = starting.keep_programs(argparse.Namespace(compile_cache=True))
    folder = Path(set_to["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "kimi-jax" / "programs" and kept == f" (first time; kept in {folder})"
    folder.mkdir(parents=True)
    (folder / "program").touch()
    assert starting.keep_programs(argparse.Namespace(compile_cache=True)) == f" (kept in {folder})"
    config.jax_compilation_cache_dir = "/elsewhere"  # JAX's own variable says so
    assert starting.keep_programs(argparse.Namespace(compile_cache=True)) == " (first time; kept in /elsewhere)"
    assert starting.keep_programs(argparse.Namespace(compile_cache=False)) == ""
    assert set_to["jax_enable_compilation_cache"] is False


def test_without_a_terminal_no_line_is_wrapped_and_compiling_is_told(capsys, tmp_path):
    log = console(stderr=True)
    log.print("word " * 60)
    with starting.compiling(log, f" (first time; kept in {tmp_path}/gone)") as name:
        name("decode, 1 rows")
        name("prefill, 16 tokens")
    first, decode, prefill, last = capsys.readouterr().err.splitlines()
    assert first == ("word " * 60).rstrip() or first == "word " * 60
    assert re.fullmatch(rf"compiling after \d\.\d s: decode, 1 rows \(first time; kept in {tmp_path}/gone\)", decode)
    assert re.fullmatch(r"compiling after \d\.\d s: prefill, 16 tokens", prefill)
    assert re.fullmatch(r"compiled 2 programs in \d\.\d s", last)


def test_without_a_terminal_a_long_job_writes_a_line_now_and_then(monkeypatch, capsys):
    times = iter([0.0, 0.0, 10.0, 30.0, 31.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with checkpoints.progress_bar("loading") as show:
        for done in (0, 10**9, 3 * 10**9, 4 * 10**9, 6 * 10**9):
            show(done, 6 * 10**9)
    assert capsys.readouterr().err == "loading: 3.00 of 6.00 GB, 100 MB/s, 30 s left\n"


# --- demo -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(tmp_path):
    command = [sys.executable, "-m", "kimi_jax.cli", "demo", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shown, commands = done.stdout.split("\nTry next:\n")
    out = " ".join(shown.split())
    assert "kimi_k25 (safetensors): 1 x mla + dense, 2 x mla + moe, 2 vision layers" in out
    assert re.search(r"Converted to Orbax: 1\.\d\d MB in \d+ tensors -> 1\.\d\d MB in \d+ leaves", out)
    assert "mesh of {'data': 2, 'expert': 4, 'tensor': 1, 'sequence': 1}. Bytes on each of its 8 devices:" in out
    assert [f"cpu:{i}: " in out for i in range(8)] == [True] * 8
    assert "thinks: I see 4, 2 and 7. Kimi: 427 " in out
    assert 'calls: add {"a": 58, "b": 316}' in out and "tool: 374" in out and "Kimi: The sum is 374. " in out
    # The commands that it ends with have the files that they name
    found = [command_parser().parse_args(shlex.split(line)[1:]) for line in commands.splitlines()]
    assert len(found) == 3 and all(one.path == tmp_path / "kept" / "k25-digits" for one in found)
    assert Path(found[1].image[0]).is_file() and checkpoints.summary(found[0].path).model_type == "kimi_k25"
