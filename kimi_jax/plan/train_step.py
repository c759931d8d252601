"""The training step of a plan as JAX traces it, with shapes for weights, states and rows: nothing is allocated."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kimi_jax.model.kimi import abstract
from kimi_jax.plan.train_job import TrainJob
from kimi_jax.training import Recipe, Rows, Trainer, optimizer
from sharding import TRAIN, Partition

# The names of the routed experts' masters among a compiled program's arguments, a regular expression (others are
# `shared_experts`)
EXPERTS = r"state\.trained.*'experts"
LEARNING_RATE = 1e-4  # a number: its value changes nothing that is planned


def trace(job: TrainJob, mesh: Mesh | AbstractMesh) -> Any:
    """Traces the job's step, with all of its layers: float32 masters and momentum, products and Newton-Schulz in bf16.

    Arguments are named `state` and `rows`.
    """
    partition = Partition(mesh, TRAIN)
    model = abstract(job.config.dense(), jnp.float32, mesh, TRAIN)
    trainer = Trainer(
        model,
        lambda params: optimizer(params, LEARNING_RATE, dtype=jnp.bfloat16, partition=partition),
        Recipe(job.config, dtype=jnp.bfloat16),
        partition,
    )
    layout = model.stream_layout(partition, job.rows, job.tokens)
    where = NamedSharding(mesh, layout.row_spec())
    array = jax.ShapeDtypeStruct((job.rows, job.tokens), jnp.int32, sharding=where)
    return trainer.step.trace(trainer.state, Rows(array, array, array, array, array))
