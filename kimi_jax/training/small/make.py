"""Makes a small model from nothing: a random checkpoint, its training, the average of its weights, published."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import checkpoints
from checkpoints.published.quantization_config import Form
from checkpoints.toy import write_toy
from kimi_jax.model.kimi import Kimi
from kimi_jax.processor import Processor
from kimi_jax.text.tiny import write_tiny_tokenizer
from kimi_jax.training.optimizer import optimizer, warmup_stable_decay
from kimi_jax.training.rows import Rows
from kimi_jax.training.small.batches import ahead, draw_rows
from kimi_jax.training.small.recipe import SmallRecipe
from kimi_jax.training.step import Metrics, Recipe, Trainer

WARMUP, DECAY = 30, 0.4  # steps in which a stage's learning rate rises, and the share of a stage in which it falls
ADAMW = 0.6  # AdamW's learning rate over Muon's
# Published are weights averaged over steps: each step's average is this share of the one before it.
AVERAGE = 0.99
BIAS_RATE, BIAS_RESTS = 1e-3, 0.95


def make(
    recipe: SmallRecipe,
    out: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, Metrics], Any] = lambda step, metrics: None,
) -> Path:
    """Trains the model of `recipe`, publishes it in `out`/NAME, and returns that folder.

    All that is trained is a function of `seed`. `out` has the random checkpoint `begin`, and `metrics.jsonl`, too.
    """
    begin = write_begin(recipe, out / "begin", seed)
    processor = Processor.from_folder(begin)
    config = processor.config
    model = Kimi(config.dense(), rngs=nnx.Rngs(seed), dtype=jnp.float32)
    rests = int(BIAS_RESTS * recipe.steps)
    trainer = Trainer(
        model,
        lambda params: optimizer(
            params,
            _schedule(recipe, 1.0),
            adamw_schedule=_schedule(recipe, ADAMW),
            weight_decay=0.1,
            adamw_weight_decay=0.01,
        ),
        Recipe(config, bias_rate=lambda step: jnp.where(step < rests, BIAS_RATE, 0.0)),
    )

    def batch(step: int) -> Rows:
        stage, share = recipe.stage_at(step)
        random = np.random.default_rng((seed, step))
        return draw_rows(stage.source(processor, share), config, stage.room, stage.rows, random)

    state, average = trainer.state, jax.tree.map(jnp.copy, trainer.state.trained)
    with (out / "metrics.jsonl").open("w") as log:
        for step, rows in ahead(batch, range(recipe.steps)):
            began = time.monotonic()
            state, metrics = trainer.step(state, rows)
            average = _average(average, state.trained, min(AVERAGE, (step + 1) / (step + 10)))
            values = {name: value.item() for name, value in metrics._asdict().items()}
            log.write(json.dumps({"step": step, **values, "seconds": round(time.monotonic() - began, 3)}) + "\n")
            log.flush()
            progress(step, metrics)
    form: Form = "bf16" if config.text.quantization is None else "int4"
    weights = nnx.merge(trainer.graph, average, state.frozen)
    return checkpoints.publish(weights, begin, out / recipe.name, form=form)


def write_begin(recipe: SmallRecipe, folder: Path, seed: int) -> Path:
    """Writes a random checkpoint of the recipe with its tokenizer, and all else that is published beside weights."""
    write_toy(folder, recipe.config, seed=seed, shards=1)
    write_tiny_tokenizer(folder, recipe.text)
    generation = folder / "generation_config.json"  # every command answers as it is measured, greedy
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"do_sample": False}, indent=2) + "\n")
    return folder


@jax.jit
def _average(average: Any, new: Any, share: Any) -> Any:
    return jax.tree.map(lambda old, now: share * old + (1 - share) * now, average, new)


def _schedule(recipe: SmallRecipe, factor: float) -> optax.Schedule:
    schedules, ends, end = [], [], 0
    for stage in recipe.stages:
        decay = round(DECAY * stage.steps)
        stable = stage.steps - WARMUP - decay
        schedules.append(warmup_stable_decay(factor * stage.peak, WARMUP, stable, decay, end=stage.end, shape="linear"))
        ends.append(end := end + stage.steps)
    return optax.join_schedules(schedules, ends[:-1])
