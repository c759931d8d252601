"""Says how a small model is made: its configuration, its tokenizer's text, stages of training, what is measured."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kimi_jax.processor import Processor
from kimi_jax.training.packing import Room
from kimi_jax.training.small.batches import Source

# A conversation, `{"messages", "tools", "thinking"}`.
Conversation = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Trains `steps` steps, each of `rows` rows of `room`, on what `source` gives by the share of the stage that is
    done.

    peak: the learning rate of Muon, held after a rise; end: the share of it to which it falls over the last 40 %.
    """

    steps: int
    source: Callable[[Processor, float], Source]
    room: Room
    peak: float
    end: float = 0.2
    rows: int = 8


@dataclasses.dataclass(frozen=True)
class SmallRecipe:
    """Says how the small model `name` is made.

    config: its config.json. text: what its tokenizer's merges are learned from.
    measures: by name, draws a conversation that is held out from training; what the model writes at each assistant's
        message is compared with that message.
    """

    name: str
    config: Mapping[str, Any]
    text: str
    stages: tuple[Stage, ...]
    measures: Mapping[str, Callable[[np.random.Generator], Conversation]]

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, float]:
        """Returns the stage of a step, and the share of it that is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        raise ValueError(f"{self.name} is trained for {self.steps} steps")
