"""Low-rank adapters over frozen INT4 experts: what they cost, and that the merged checkpoint is what was trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import checkpoints
from checkpoints.published.quantization_config import int4
from checkpoints.toy import toy_config, write_toy
from kimi_jax.cli import main
from kimi_jax.training import Rows, as_published, is_adapted, label_logits, make_adapters, merge_adapters
from kimi_jax.training.leaves import named_leaves
from kimi_jax.training.run import Run, Settings
from sharding import make_mesh

SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "q_lora_rank": 32,
}  # fmt: skip
RANK = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains adapters of a toy with INT4 experts for four steps."""
    root = tmp_path_factory.mktemp("adapters")
    write_toy(root / "toy", toy_config("k2", **SIZES, quantization_config=int4(("lm_head",))), shards=1)
    line = json.dumps({"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1, one"}]})
    (root / "data.jsonl").write_text(f"{line}\n" * 4)
    settings = Settings(4, rows=1, tokens=80, learning_rate=0.02, trainable=is_adapted, adapter_rank=RANK, save_every=2)
    made = Run(root / "toy", root / "data.jsonl", root / "out", settings)
    made.losses = [float(metrics.loss) for _, metrics in made.steps()]
    yield made
    made.close()


def test_adapters_alone_are_trained_and_cost_memory(run):
    assert run.losses[-1] < 0.9 * run.losses[0]
    frozen, trained = named_leaves(run.state.frozen), named_leaves(run.state.trained)
    adapted = {name.rpartition(".")[0] for name in trained}
    assert adapted == {name for name in frozen if is_adapted(name)} and len(adapted) == 8
    # Given codes, whose experts are not among them, AdamW keeps two moments of each factor, and nothing else
    assert any(name.endswith("experts.up_proj.codes") for name in frozen)
    rank_sizes = sum(RANK * sum(frozen[name].shape) for name in adapted)
    assert sum(x.size for x in jax.tree.leaves(run.state.trained)) == rank_sizes
    assert sum(x.size for x in jax.tree.leaves(run.state.optimizer) if x.ndim) == 2 * rank_sizes


def test_the_merged_checkpoint_computes_what_was_trained(run):
    # Given the logits of the matrices with their adapters, as the loss is taken of them
    tokens = np.random.RandomState(0).randint(0, 500, (1, 40))
    changed, others = merge_adapters(run.state.frozen, run.state.trained)
    trained = nnx.merge(run.trainer.graph, as_published(changed, run.trainer.recipe.config), others)
    expected, _ = nnx.jit(label_logits)(trained, Rows.whole(tokens))
    # When they are published
    out = run.publish()
    found = np.asarray(checkpoints.load(out, dtype=jnp.float32)(tokens))[:, :-1]
    # Then the folder gives them, and its experts are those that it began with, bit for bit
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (run.folder, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = tensor.tobytes() == after[name].tobytes()
        assert same != is_adapted(name) or name.endswith("e_score_correction_bias"), name


@pytest.mark.slow
def test_a_mesh_trains_the_adapters_of_one_device(run, tmp_path):
    settings, mesh = run.settings, make_mesh("2x1x2", jax.devices()[:4])
    sharded = Run(run.folder, run.folder.parent / "data.jsonl", tmp_path / "out", settings, mesh=mesh)
    factors = named_leaves(sharded.state.trained)
    assert any(not x.sharding.is_fully_replicated for x in factors.values())
    losses = [float(metrics.loss) for _, metrics in sharded.steps()]
    sharded.close()
    np.testing.assert_allclose(losses, run.losses, rtol=1e-4)  # (weights are rounded to bf16 at each step)


def test_an_adapter_that_has_not_been_trained_changes_nothing():
    axes = {"axes": ("heads", "embed"), "full_shape": (4, 6)}
    weights = nnx.State({"proj": {"weight": nnx.Param(jnp.arange(24.0).reshape(4, 6), **axes)}})
    adapters = make_adapters(weights, 2)
    assert {name: x.shape for name, x in named_leaves(adapters).items()} == {
        "proj.weight.lora_a": (2, 6), "proj.weight.lora_b": (4, 2),
    }  # fmt: skip
    merged, others = merge_adapters(weights, adapters)
    np.testing.assert_array_equal(named_leaves(merged)["proj.weight"], named_leaves(weights)["proj.weight"])
    assert not jax.tree.leaves(others)
    with pytest.raises(ValueError, match=r"norm has shape \(4,\), expected a matrix for an adapter"):
        make_adapters(nnx.State({"norm": nnx.Param(jnp.ones(4), axes=(None,), full_shape=(4,))}), 2)


def test_a_rank_without_adapters_is_refused(run, tmp_path, capsys):
    command = ["train", str(run.folder), "--data", str(run.folder.parent / "data.jsonl"), "--out", str(tmp_path)]
    assert main([*command, "--rank", "4"]) == 1
    assert "--rank 4 is the rank of adapters, and goes with --train adapters" in capsys.readouterr().err
