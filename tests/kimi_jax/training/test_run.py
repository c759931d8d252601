"""A run: what is published computes what was trained; a stopped run goes on bit for bit, on another mesh too."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from several_processes import run_job

import checkpoints
from checkpoints.toy import toy_config, write_toy
from kimi_jax.cli import main
from kimi_jax.config_json import from_dict
from kimi_jax.training import Checkpoints, Rows, TrainState, as_published, label_logits
from kimi_jax.training.leaves import named_leaves
from kimi_jax.training.run import Run, Settings
from sharding import make_mesh

SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "q_lora_rank": 32, "vt_hidden_size": 32, "vt_intermediate_size": 32,
    "vt_num_hidden_layers": 1,
}  # fmt: skip
SETTINGS = Settings(steps=6, rows=2, tokens=64, learning_rate=5e-3, save_every=2)


def conversation(number):
    answer = {"role": "assistant", "content": f"{number % 3}!", "reasoning_content": "hm"}
    return {"messages": [{"role": "user", "content": f"say {number % 3}"}, answer], "thinking": number % 2 == 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a toy K2.5 and a file of conversations beside it."""
    root = tmp_path_factory.mktemp("run")
    write_toy(root / "toy", toy_config("k2.5", **SIZES), shards=1)
    (root / "data.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(20)))
    return root


@pytest.fixture(scope="module")
def run(folder):
    """Trains six steps, with a checkpoint every two."""
    made = Run(folder / "toy", folder / "data.jsonl", folder / "out", SETTINGS)
    list(made.steps())
    yield made
    made.close()


def bits(state):
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def test_the_published_folder_computes_what_was_trained(folder, run):
    # Given a run whose loss fell, and its numbers as they are published
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6)) and lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(line["labels"] > 10 and line["largest_logit"] > 0 and line["imbalance"] >= 1 for line in lines)
    tokens, config = np.random.RandomState(0).randint(0, 500, (1, 40)), run.trainer.recipe.config
    published = as_published(run.state.trained, config)
    trained = nnx.merge(run.trainer.graph, published, run.state.frozen)
    expected, _ = nnx.jit(label_logits)(trained, Rows.whole(tokens))
    # When it is published, and loaded
    out = run.publish()
    model = checkpoints.load(out, dtype=jnp.float32)
    assert model.config.text.quantization is not None
    # Then its INT4 experts give the same logits
    found = np.asarray(model(tokens))[:, :-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert checkpoints.convert(out, folder / "converted").destination.is_dir()


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(run):
    expected = bits(run.state)
    run.state = run.checkpoints.restore(run.state, 2)
    assert run.step == 2
    list(run.steps())
    assert bits(run.state) == expected


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_either_goes_on_where_the_other_stopped(folder, tmp_path):
    # Given a run of two processes with four devices each
    asked = [
        "--data",
        str(folder / "data.jsonl"),
        "--batch",
        "2",
        "--tokens",
        "64",
        "--lr",
        "5e-3",
        "--save-every",
        "2",
    ]
    command = ["train", str(folder / "toy"), *asked, "--steps", "4", "--mesh", "2x2x1x2", "--out"]
    (code, out, err), second = run_job(*[[*command, str(tmp_path / "two")]] * 2)
    # Then the first process alone speaks and publishes
    assert (code, out, second[:2]) == (0, f"{tmp_path}/two/published\n", (0, "")), (err, second)
    assert "4 steps" in err and "documents" not in second[2]
    # and the steps are those of one process with eight devices (Newton-Schulz makes roundings larger from step to step)
    assert main([*command, str(tmp_path / "one")]) == 0
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-4)
    np.testing.assert_allclose(losses["two"][:2], losses["one"][:2], rtol=1e-6)
    one, two = (checkpoints.load(tmp_path / name / "published") for name in ("one", "two"))
    for name, expected in named_leaves(nnx.state(one.model.embed_tokens)).items():
        found = named_leaves(nnx.state(two.model.embed_tokens))[name]
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0, atol=0.01)
    assert checkpoints.summary(tmp_path / "two" / "published") == checkpoints.summary(tmp_path / "one" / "published")
    # When the last two steps are lost
    for name in ("checkpoints/4", "published"):
        shutil.rmtree(tmp_path / "two" / name)
    # Then one process goes on from what two have saved
    assert main([*command, str(tmp_path / "two"), "--resume"]) == 0
    again = [json.loads(line)["loss"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(again[4:], losses["two"][2:], rtol=1e-4)


@pytest.mark.slow
def test_microbatches_that_keep_activations_make_the_step_of_one_pass(folder, run, tmp_path):
    # Given a state, and two rows of which one has fewer labels: a mean of means would be another number
    settings = dataclasses.replace(SETTINGS, microbatches=2, recompute=False)
    halves = Run(folder / "toy", folder / "data.jsonl", tmp_path / "out", settings)
    rows = run.packing.batch(2)
    rows.columns[0, 3:] = -1
    assert len({int(np.sum(row >= 0)) for row in rows.columns}) == 2
    # When the step takes one row after the other
    expected, numbers = run.trainer.step(run.checkpoints.restore(run.state, 2), rows)
    found, metrics = halves.trainer.step(run.checkpoints.restore(run.state, 2), rows)
    halves.close()
    # Then it is the step of both at once (single numbers differ by more: Newton-Schulz makes roundings larger)
    np.testing.assert_allclose(metrics, numbers, rtol=1e-6)
    for part, bound in (("trained", 1e-6), ("frozen", 0), ("optimizer", 1e-5)):
        pairs = zip(*(named_leaves(getattr(state, part)).items() for state in (found, expected)), strict=True)
        far = {
            name: np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30) for (name, one), (_, other) in pairs
        }
        assert max(far.values()) <= bound, max(far.items(), key=lambda item: item[1])


def test_a_checkpoint_of_another_run_is_refused(folder, run, tmp_path):
    settings = run.checkpoints.settings | {"seed": 1}
    other = Checkpoints(folder / "out" / "checkpoints", run.trainer.recipe.config, settings)
    with pytest.raises(ValueError, match="checkpoint 6 was saved with seed 0, this run has 1"):
        other.restore(run.state)
    common = {name: value for name, value in run.checkpoints.settings.items() if name != "model"}
    bf16 = Checkpoints(folder / "out" / "checkpoints", run.trainer.recipe.config.dense(), common)
    with pytest.raises(ValueError, match=r"checkpoint 6 was saved with model '\w{16}', this run has '\w{16}'"):
        bf16.restore(run.state)
    part = dataclasses.replace(run.state, frozen={})
    with pytest.raises(ValueError, match=r"checkpoint 6 is of other parameters than this run trains: .* frozen\.model"):
        run.checkpoints.restore(part)
    empty = Checkpoints(tmp_path / "nothing", run.trainer.recipe.config, settings)
    with pytest.raises(FileNotFoundError, match="has no checkpoint to go on from"):
        empty.restore(run.state)
    for one in (other, bf16, empty):
        one.close()


@contextmanager
def full_disk(room):
    """Lets no file of this process grow beyond so many bytes, as a disk that is full would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# (TensorStore may end another write once Orbax has closed the event loop in which it was begun.)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    # Given a run with a checkpoint
    config = from_dict(toy_config("k2.5", **SIZES))
    noise = np.random.RandomState(0).standard_normal(200_000).astype(np.float32)
    states = [TrainState(jnp.int32(step), {"w": jnp.asarray(step * noise)}, {}, {}) for step in range(4)]
    one = Checkpoints(tmp_path / "run", config, {})
    one.save(states[1], 1)
    one.wait()
    # When there is no room for the next
    message = r"/run: a checkpoint was not saved, 1 is the newest: File too large"
    with full_disk(200_000), pytest.raises(OSError, match=message):
        one.save(states[2], 2)
        one.wait()
    # Then the one before is the newest, for another process too
    other = Checkpoints(tmp_path / "run", config, {})
    assert one.latest == other.latest == 1
    assert bits(other.restore(states[0])) == bits(states[1])
    # And what is saved when there is room is found
    one.save(states[3], 3)
    one.wait()
    again = Checkpoints(tmp_path / "run", config, {})
    assert bits(again.restore(states[0])) == bits(states[3])
    for checkpoints_of_run in (one, other, again):
        checkpoints_of_run.close()


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_checkpoint(run):
    spoilt = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), run.state.trained)
    before, run.state = run.state, run.checkpoints.restore(run.state, 4)
    run.state = type(run.state)(run.state.step, spoilt, run.state.frozen, run.state.optimizer)
    with pytest.raises(FloatingPointError, match=r"the loss of step 4 is nan; .*checkpoints/6 is from before it"):
        list(run.steps())
    run.state = before


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--train", "("], "is no regular expression"),
        (["--train", "nothing"], "no parameter is trained"),
        (["--data", "{root}/none.jsonl"], "none.jsonl: no such file"),
        (["--batch", "6", "--microbatches", "4"], "6 rows of a step do not divide into 4 microbatches"),
        (["--tokens", "16"], "document 0 has .* tokens, but a row has 16"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder, tmp_path, capsys, flags, reason):
    command = ["train", str(folder / "toy"), "--data", str(folder / "data.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*command, *(flag.replace("{root}", str(folder)) for flag in flags)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"kimi-jax: .*{reason}.*", line)
    assert not (tmp_path / "out" / "published").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, run, tmp_path):
    # Given a run that is killed after its first checkpoint, by a signal that it cannot see
    command = [sys.executable, "-m", "kimi_jax.cli", "train", str(folder / "toy"), "--data", str(folder / "data.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--steps", "6", "--batch", "2", "--tokens", "64", "--lr", "5e-3"]
    command += ["--save-every", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "out" / "checkpoints" / "2").is_dir():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # When the same command goes on
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    # Then its weights are those of the run that was not stopped
    published = tmp_path / "straight"
    checkpoints.publish(run.trainer.model(run.state), folder / "toy", published)
    for file in published.glob("*.safetensors"):
        assert (tmp_path / "out" / "published" / file.name).read_bytes() == file.read_bytes()
    # And without --resume it is refused
    assert main([*command[3:]]) == 1


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(folder, run, tmp_path):
    shutil.copytree(folder / "out" / "checkpoints", tmp_path / "out" / "checkpoints")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / str(step))
    mesh = make_mesh("2x2x2x1")
    other = Run(folder / "toy", folder / "data.jsonl", tmp_path / "out", SETTINGS, mesh=mesh, resume=True)
    assert other.step == 2
    losses = [float(metrics.loss) for _, metrics in other.steps()]
    other.close()
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses[0], lines[2]["loss"], rtol=1e-6)
    np.testing.assert_allclose(losses, [line["loss"] for line in lines[2:6]], rtol=1e-4)
