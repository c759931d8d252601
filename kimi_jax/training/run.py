"""A run of supervised fine-tuning: from a checkpoint's folder and a file of conversations to a published folder.

What a step trains is a function of the settings and its number, so that a run that was stopped, however, goes on from
its newest checkpoint as if it had not been.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import checkpoints
from checkpoints.published.quantization_config import Form
from kimi_jax.processor import Processor
from kimi_jax.training.leaves import everything
from kimi_jax.training.masters import dense_masters
from kimi_jax.training.optimizer import optimizer, warmup_stable_decay
from kimi_jax.training.packing import Packing, Room
from kimi_jax.training.samples import Document, read_documents
from kimi_jax.training.saving import Checkpoints
from kimi_jax.training.step import Metrics, Recipe, Trainer
from sharding import TRAIN, Partition

# Shares of a run: in which the learning rate rises, and falls, and in which the routers' biases rest at its end.
WARMUP, DECAY, BIAS_RESTS = 0.05, 0.3, 0.05
BIAS_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run: `steps` of `rows` rows of `tokens` tokens, with a peak learning rate for Muon and AdamW alike.

    quantized: train experts for INT4, and publish them so; False publishes bf16.
    trainable: takes a parameter's name; experts that are INT4 stay so where none is trained.
    adapter_rank: trains adapters of this rank in place of what is trainable, and publishes them merged; 0 for none.
    seed: that of the order of the documents. save_every: steps from one checkpoint to the next.
    microbatches: parts of a step's rows that are computed one after another, in the memory of one.
    recompute: compute each layer again for its gradient; False keeps what that needs, faster in more memory.
    """

    steps: int
    rows: int = 8
    tokens: int = 1024
    learning_rate: float = 2e-4
    weight_decay: float = 0.1
    quantized: bool = True
    trainable: Callable[[str], bool] = everything
    adapter_rank: int = 0
    seed: int = 0
    save_every: int = 100
    microbatches: int = 1
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.rows % self.microbatches:
            raise ValueError(f"{self.rows} rows of a step do not divide into {self.microbatches} microbatches")

    def schedule(self) -> Any:
        """Returns the learning rate as a function of the step's number."""
        warmup, decay = (max(1, math.ceil(share * self.steps)) for share in (WARMUP, DECAY))
        stable = max(0, self.steps - warmup - decay)
        return warmup_stable_decay(self.learning_rate, warmup, stable, decay, end=0.05, shape="linear")


class Run:
    """Trains the checkpoint in `folder` on the conversations of `data`, with all that it writes in `out`: checkpoints,
    metrics.jsonl, and at the end `published`. Several processes do so together, on a mesh of all their devices; each
    reads the same files, and `out` is a folder that all of them see.

    Raises ValueError, FileNotFoundError or OSError naming the file and field that is wrong, and where `out` has a
    checkpoint of another run; FileExistsError where it has one and the run is not to `resume`.
    """

    def __init__(
        self,
        folder: str | Path,
        data: str | Path,
        out: str | Path,
        settings: Settings,
        *,
        mesh: Mesh | None = None,
        resume: bool = False,
    ):
        self.folder, self.out, self.settings = Path(folder), Path(out), settings
        processor = Processor.from_folder(folder)
        self.documents: list[Document] = list(read_documents(data, processor))
        room = Room.of(self.documents, settings.tokens)
        self.packing = Packing(self.documents, processor.config, room, settings.rows, settings.seed)
        published = self.out / "published"
        if published.exists():
            raise FileExistsError(f"{published}: is there already; this run has ended")
        kept = {"steps": settings.steps, "room": list(dataclasses.astuple(room)), "rows": settings.rows}
        self.checkpoints = Checkpoints(
            self.out / "checkpoints", processor.config, {**kept, "seed": settings.seed, "int4": settings.quantized}
        )
        if self.checkpoints.latest is not None and not resume:
            raise FileExistsError(
                f"{self.out}: has a checkpoint after {self.checkpoints.latest} steps; resume, or take another folder"
            )
        partition = Partition(mesh, TRAIN)
        model = checkpoints.load(folder, mesh=mesh, rules=TRAIN, dtype=jnp.float32)
        if not settings.adapter_rank and any(settings.trainable(name) for name in _experts(model)):
            model = dense_masters(model)
        config = processor.config if settings.quantized else processor.config.dense()
        schedule = settings.schedule()
        rests = math.ceil(settings.steps * (1 - BIAS_RESTS))
        self.trainer = Trainer(
            model,
            lambda params: optimizer(params, schedule, weight_decay=settings.weight_decay, partition=partition),
            Recipe(
                config,
                bias_rate=lambda step: jnp.where(step < rests, BIAS_RATE, 0.0),
                trainable=settings.trainable,
                adapter_rank=settings.adapter_rank,
                microbatches=settings.microbatches,
                recompute=settings.recompute,
            ),
            partition,
        )
        self.state = self.trainer.state
        if self.checkpoints.latest is not None:
            self.state = self.checkpoints.restore(self.state)

    @property
    def step(self) -> int:
        """The number of steps done."""
        return int(self.state.step)

    def steps(self) -> Iterator[tuple[int, Metrics]]:
        """Trains, and yields the number and metrics of each step, which metrics.jsonl has too.

        Raises FloatingPointError where a loss is not finite, naming the step and the newest checkpoint, which is from
        before it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        first = jax.process_index() == 0
        with (self.out / "metrics.jsonl" if first else Path(os.devnull)).open("a") as log:
            for number in range(self.step, self.settings.steps):
                began = time.monotonic()
                self.state, metrics = self.trainer.step(self.state, self.packing.batch(number))
                values = {name: value.item() for name, value in metrics._asdict().items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"the loss of step {number} is {values['loss']}; {self._newest()} is from before it"
                    )
                seconds = time.monotonic() - began
                line = {"step": number, **values, "seconds": seconds}
                log.write(json.dumps({name: _json(value) for name, value in line.items()}) + "\n")
                log.flush()
                if (number + 1) % self.settings.save_every == 0 or number + 1 == self.settings.steps:
                    self.checkpoints.save(self.state, number + 1)
                yield number, metrics
        self.checkpoints.wait()

    def publish(self) -> Path:
        """Publishes the weights in `out`/published, in the layout of the releases, and returns the folder."""
        weights = self.trainer.model(self.state)
        form: Form = "int4" if self.settings.quantized else "bf16"
        return checkpoints.publish(weights, self.folder, self.out / "published", form=form)

    def close(self) -> None:
        """Waits for what is being saved."""
        self.checkpoints.close()

    def _newest(self) -> str:
        self.checkpoints.wait()
        latest = self.checkpoints.latest
        return "no checkpoint" if latest is None else f"{self.checkpoints.folder}/{latest}"


def _experts(model: Any) -> list[str]:
    text = model.config.text
    return [
        f"model.layers.{layer}.mlp.experts.{name}.weight"
        for layer in range(text.num_hidden_layers)
        if text.is_moe(layer)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def _json(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None
