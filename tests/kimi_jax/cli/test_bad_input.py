"""Bad input to the `kimi-jax` command: exit code 2 with its usage, or 1 with one clear line."""

import json
import shutil

import numpy as np
import pytest
from calls import generate, refused
from safetensors.numpy import load_file, save_file

from checkpoints.toy import toy_config
from kimi_jax.cli import main

SECOND = "model-00002-of-000003.safetensors"
EXPERT = "language_model.model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["convert", "only-one"],
        ["convert", "a", "b", "--experts", "int8"],
        ["export", "only-one"],
        ["export", "a", "b", "--shard-size", "huge"],
        ["verify"],
        ["make-toy", "folder"],
        ["make-toy", "folder", "--like", "k9"],
        ["make-toy", "folder", "--like", "k2", "--from", "other"],
        ["make-toy", "folder", "--like", "k2", "--set", "hidden_size"],
        ["inspect"],
        ["inspect", "folder", "--preset", "kimi-k2"],
        ["generate", "folder"],
        ["generate", "folder", "--prompt", "a", "--chat", "b"],
        ["generate", "folder", "--prompt", "a", "--dtype", "float8"],
        ["generate", "folder", "--prompt", "a", "--top-k", "many"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: kimi-jax")


GENERATE = ("generate", "folder", "--prompt", "a")
PLAN = ("plan", "--model", "k2", "--topology", "v5e:2x4")
MAKE_TOY = ("make-toy", "folder", "--like", "k2")


@pytest.mark.parametrize(
    ("command", "flag", "values"),
    [
        (GENERATE, "--seed", ["-1", "4294967296", "1" + "0" * 20, "9" * 5000, "1.5"]),
        (GENERATE, "--max-new-tokens", ["0", "-1", "2147483648"]),
        (GENERATE, "--temperature", ["-1", "nan", "inf", "warm"]),
        (GENERATE, "--top-k", ["-1", "1e3"]),
        (GENERATE, "--top-p", ["0", "1.1", "nan"]),
        (GENERATE, "--min-p", ["-0.1", "1.1", "nan"]),
        (GENERATE, "--num-processes", ["0"]),
        (GENERATE, "--process-id", ["-1"]),
        (GENERATE, "--part", ["1", "2/2", "0/0", "-1/2"]),
        (GENERATE, "--coordinator", ["host", "host:0", "host:99999"]),
        (PLAN, "--batch", ["0", "-1"]),
        (PLAN, "--context", ["0", "-1"]),
        (PLAN, "--chunk", ["0"]),
        (MAKE_TOY, "--layers", ["0", "-1"]),
        (MAKE_TOY, "--experts", ["0"]),
        (MAKE_TOY, "--vision-layers", ["0"]),
        (MAKE_TOY, "--seed", ["-1", "4294967296"]),
        (MAKE_TOY, "--shard-size", ["0GB", "0.0000001KB", "9" * 400 + "GB"]),
        (MAKE_TOY, "--set", ["a=NaN", "a=1e999", "a=" + "[" * 9999, "=1"]),
        (("convert", "a", "b"), "--memory", ["0GB", "-1GB", "9999999999TB"]),
        (("convert", "a", "b"), "--workers", ["0", "100000"]),
        (("convert", "a", "b"), "--process-index", ["-1"]),
        (("convert", "a", "b"), "--num-processes", ["0"]),
        (("verify", "a", "b"), "--tolerance", ["-1", "nan", "inf"]),
    ],
)
def test_a_value_out_of_range_is_refused_before_any_work(command, flag, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as exit_:
            main([*command, f"{flag}={value}"])
        err = capsys.readouterr().err.splitlines()[-1]
        assert exit_.value.code == 2 and f"argument {flag}" in err and "expected" in err and len(err) < 600


def truncate(folder):
    file = folder / SECOND
    file.write_bytes(file.read_bytes()[:-1])


def remove(folder):
    (folder / SECOND).unlink()


def name_an_absent_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.nowhere.weight"] = SECOND
    path.write_text(json.dumps(index))


def contradict_a_weight_shape(folder):
    name = f"{EXPERT}.weight_shape"
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, path)


def odd_groups(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 33'))


def another_model(folder):
    (folder / "config.json").write_text(json.dumps(toy_config("kimi-linear")))


def unknown_model(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"kimi_k25"', '"llama"'))


DAMAGE = {
    truncate: [SECOND, "truncated: tensor mm_projector.pre_norm.bias ends at byte"],
    remove: [SECOND, "shard is missing"],
    name_an_absent_tensor: ["model.safetensors.index.json", "places tensor model.nowhere.weight", "does not hold it"],
    contradict_a_weight_shape: [".safetensors", f"tensor {EXPERT}.weight_shape says [64, 32], expected [32, 64]"],
    odd_groups: ["config.json", "group_size is 33; only 32 is supported"],
    another_model: ["config.json has num_hidden_layers 6, but there are 2 layers"],
    unknown_model: ["config.json", "model_type 'llama'"],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_bad_checkpoint_ends_every_command_in_one_line(damaged, tmp_path, capsys, damage):
    damage(damaged)
    (tmp_path / "out").mkdir()
    commands = (["convert", damaged, tmp_path / "out" / "x"], ["inspect", damaged], ["generate", damaged, "--prompt=a"])
    for command in commands:
        line = refused(capsys, main([*map(str, command)]))
        assert str(damaged) in line
        for part in DAMAGE[damage]:
            assert part in line
    assert list((tmp_path / "out").iterdir()) == []


def test_convert_never_writes_over_anything(published, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    line = refused(capsys, main(["convert", str(published), str(tmp_path / "there")]))
    assert line == f"kimi-jax: {tmp_path / 'there'}: destination exists, and is no checkpoint of ours"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "kept"


def test_a_folder_that_is_not_there(tmp_path, capsys):
    missing = str(tmp_path / "none")
    assert missing in refused(capsys, main(["convert", missing, str(tmp_path / "out")]))
    assert missing in refused(capsys, main(["inspect", missing]))
    assert missing in refused(capsys, generate(missing, "--prompt", "a"))
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_none(published, loads, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("words")
    line = refused(capsys, generate(published, "--prompt", "a", "--image", tmp_path / "notes.png"))
    assert line.startswith(f"kimi-jax: {tmp_path / 'notes.png'}: not an image that can be read (found 5 other bytes")
    assert "gone.png: no such file" in refused(capsys, generate(published, "--prompt=a", "--image=gone.png"))


def test_a_prompt_that_is_too_long(published, loads, capsys):
    line = refused(capsys, generate(published, "--prompt", "1 " * 200, "--max-new-tokens", 1))
    assert line.startswith("kimi-jax: a prompt of ") and "max_position_embeddings = 128" in line


def test_a_chat_file_that_is_none(published, tmp_path, capsys):
    chat = tmp_path / "chat.json"
    chat.write_text("[")
    assert f"{chat}: not JSON" in refused(capsys, generate(published, "--chat", chat))
    chat.write_text("[]")
    line = refused(capsys, generate(published, "--chat", chat, "--image", "a.png"))
    assert "--image and --video go with --prompt" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "3x3"], "mesh '3x3' asks for 9 devices, there are 8"),
        (["--mesh", "wide"], "mesh 'wide': expected two to four positive numbers"),
        (["--in-order"], "go with --prompts"),
        (["--out", "results.jsonl"], "go with --prompts"),
        (["--part", "1/2"], "go with --prompts"),
        (["--cache-memory", "1GiB"], "go with --prompts"),
    ],
)
def test_a_bad_flag_is_named(published, capsys, flags, message):
    assert message in refused(capsys, generate(published, "--prompt", "a", *flags))


def test_a_file_of_prompts_that_is_not_there(published, tmp_path, capsys):
    assert "gone.jsonl" in refused(capsys, generate(published, "--prompts", tmp_path / "gone.jsonl"))
    file = tmp_path / "prompts.jsonl"
    file.write_text("")
    assert "goes without" in refused(capsys, generate(published, "--prompts", file, "--image", "a.png"))


def test_with_nothing_left_to_answer_no_model_is_loaded(tmp_path, capsys):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"id": "a", "prompt": "x"}\n\n')
    out.write_text('{"id": "a", "content": "y"}\n')
    assert generate(tmp_path / "no model", "--prompts", file, "--out", out) == 0
    assert "0 answered, 0 refused, 1 were there already" in capsys.readouterr().err
    assert out.read_text() == '{"id": "a", "content": "y"}\n'


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_no_answer(published, tmp_path, temperature, capsys):
    folder = tmp_path / "nan"
    shutil.copytree(published, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("embed_tokens.weight"):
                tensors[name] = np.full_like(tensors[name], np.nan)
        save_file(tensors, file)
    options = ("--prompt", "a", "--max-new-tokens", 3, "--temperature", temperature)
    assert generate(folder, *options) == 1
    out, err = capsys.readouterr()
    reason = "kimi-jax: the logits after 0 new tokens are not finite (NaN or infinity)"
    assert out == "" and err.splitlines()[-1] == reason


def test_a_toy_that_nobody_could_read_is_not_written(tmp_path, capsys):
    assert main(["make-toy", str(tmp_path / "toy"), "--like", "k2", "--set", "num_attention_heads=3"]) == 1
    err = capsys.readouterr().err
    assert "num_key_value_heads 64 differs from num_attention_heads 3" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
