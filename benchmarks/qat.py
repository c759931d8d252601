"""Shows what INT4 experts cost with quantisation-aware training and without: one small model, trained twice.

    pip install -e .
    python benchmarks/qat.py [--steps 200] [--seeds 1] [--json FILE]

A text model of two layers of 8 experts learns to copy words and to add numbers, from nothing, with the same data and
the same optimizer, once on the numbers that INT4 will have and once on bf16 experts. Each result is published, with
INT4 experts, loaded again, and measured on conversations that it has not seen: the loss of what the assistant writes,
and the share of its tokens that come first. The run without QAT is measured with its experts in bf16 too. All is a
function of the seed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import checkpoints
from checkpoints.published.quantization_config import Form, int4
from checkpoints.toy import toy_config, write_toy
from kimi_jax import Kimi
from kimi_jax.processor import Processor
from kimi_jax.training import Recipe, Room, Rows, Trainer, documents, optimizer, sum_losses, warmup_stable_decay
from kimi_jax.training.small.batches import draw_rows
from kimi_jax.training.small.kimi_linear import add, copy

CONFIG = toy_config(
    "k2", hidden_size=64, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=64, quantization_config=int4(("lm_head",)),
)  # fmt: skip
ROOM = Room(tokens=256, labels=160, documents=16, patches=0)
ROWS, HELD_OUT = 8, 32  # rows of a step, and those that are measured
RATE, WORDS = 4e-3, 6


def rows_of(processor: Processor, count: int, seed: tuple[int, ...]) -> Rows:
    """Draws rows of conversations, a function of the seed."""

    def draw(random: np.random.Generator) -> Any:
        return documents(add(random) if random.random() < 0.5 else copy(random, WORDS), processor)

    return draw_rows(draw, processor.config, ROOM, count, np.random.default_rng(seed))


def train(begin: Path, quantized: bool, steps: int, seed: int) -> Kimi:
    """Trains a model of random weights, and returns it, unrounded."""
    processor = Processor.from_folder(begin)
    model = Kimi(processor.config.dense(), rngs=nnx.Rngs(seed), dtype=jnp.float32)
    decay = steps // 3
    schedule = warmup_stable_decay(RATE, 10, max(0, steps - 10 - decay), decay, end=0.03, shape="linear")
    config = processor.config if quantized else processor.config.dense()
    trainer = Trainer(model, lambda params: optimizer(params, schedule), Recipe(config))
    state = trainer.state
    for step in range(steps):
        state, metrics = trainer.step(state, rows_of(processor, ROWS, (seed, step)))
        if step % 20 == 0:
            print(f"{'QAT' if quantized else 'no QAT'}, step {step}: {float(metrics.loss):.4f}", file=sys.stderr)
    return trainer.model(state)


@nnx.jit
def _losses(model: Kimi, rows: Rows) -> Any:
    return sum_losses(model, rows)[0]


def measure(model: Kimi, begin: Path, form: Form, folder: Path) -> dict[str, float]:
    """Publishes the model, loads what was published, and returns its loss and accuracy on held-out conversations."""
    loaded = checkpoints.load(checkpoints.publish(model, begin, folder, form=form), dtype=jnp.float32)
    rows = rows_of(Processor.from_folder(begin), HELD_OUT, (1000,))
    losses, labels = _losses(loaded, jax.tree.map(jnp.asarray, rows)), int(np.sum(rows.columns >= 0))
    return {"loss": float(losses.loss) / labels, "accuracy": float(losses.correct) / labels}


def compare(steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Trains both models of a seed, and returns the measures of what they publish."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        begin = write_toy(root / "begin", CONFIG, seed=seed, shards=1)
        with_qat, without = (train(begin, quantized, steps, seed) for quantized in (True, False))
        return {
            "with QAT, INT4": measure(with_qat, begin, "int4", root / "qat"),
            "without, INT4": measure(without, begin, "int4", root / "rounded"),
            "without, bf16": measure(without, begin, "bf16", root / "bf16"),
        }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates of each of the two trainings")
    parser.add_argument("--seeds", type=int, default=1, help="how often all is done")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    if options.steps < 20 or options.seeds < 1:
        parser.error("expected at least 20 steps and one seed")
    results = [compare(options.steps, seed) for seed in range(options.seeds)]
    table = Table("seed", "experts", "held-out loss", "tokens right", title=f"{options.steps} steps")
    for seed, found in enumerate(results):
        for name, values in found.items():
            table.add_row(str(seed), name, f"{values['loss']:.4f}", f"{values['accuracy']:.2%}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
