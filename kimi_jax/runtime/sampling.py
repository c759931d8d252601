"""Says how the next token is chosen: greedily, or drawn after temperature, top-k, top-p (nucleus sampling, arXiv
1904.09751) and min-p (arXiv 2407.01082). Each sequence has its own values, which are arrays, so that new values compile
nothing; `draw` computes with them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kimi_jax import json_reader
from kimi_jax.axes import AnyArray, Float32, Int32, UInt32
from kimi_jax.config_json.fields import ConfigError, Fields
from kimi_jax.model.token_ids import integers
from kimi_jax.printable import printable
from kimi_jax.text.modes import TEMPERATURE, TOP_P

SEEDS = 2**63
MAX_TOP_K = 2**31 - 1  # an int32 on the device
# Presence, frequency and repetition penalty that change nothing.
NO_PENALTIES = (0.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Says how tokens are drawn; `temperature` 0 is greedy. The filters apply in the order of the fields: they keep the
    `top_k` most likely tokens (0: all), of these the fewest whose probabilities add up to `top_p`, and of these the
    tokens with at least `min_p` times the best one's probability.

    Before all that, and for greedy answers too, the logits of tokens that occurred already are lowered: those above 0
    are divided by `repetition_penalty` and those below multiplied by it where the token occurred in the prompt or the
    answer; then `frequency_penalty` is subtracted for each time that the answer has the token, and `presence_penalty`
    once.

    Raises ValueError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0 and self.top_k == math.floor(self.top_k), "a whole number, at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            # (further away a logit could become infinite)
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The penalties in the order of `NO_PENALTIES`."""
        return self.presence_penalty, self.frequency_penalty, self.repetition_penalty

    @classmethod
    def recommended(cls, thinking: bool) -> "Sampling":
        """Returns what Moonshot recommends for answers with `thinking` or without."""
        return cls(temperature=TEMPERATURE[thinking], top_p=TOP_P)

    @classmethod
    def from_folder(cls, path: str | Path, default: "Sampling | None" = None) -> "Sampling":
        """Reads how the checkpoint in the folder `path` wants its answers drawn, from generation_config.json.

        Where that says `do_sample`, or names a temperature without it, its values hold, with temperature 1 and no
        filters for those it leaves out. Where it says `do_sample: false`, answers are greedy. Where it says neither, as
        in Kimi's own releases, the `default` holds, None being greedy. Raises `ConfigError` (a ValueError) naming the
        file and the field of a value outside its range.
        """
        default = cls() if default is None else default
        file = Path(path) / "generation_config.json"
        if not file.exists():
            return default
        fields = Fields(json_reader.read_object(file, error=ConfigError), printable(file))
        if not fields.has("do_sample") and not fields.has("temperature"):
            return default
        if not fields.flag("do_sample", True):
            return cls()
        return cls(
            temperature=fields.number("temperature", 1.0, above=False),
            top_k=fields.integer("top_k", 0, most=MAX_TOP_K),
            top_p=fields.number("top_p", 1.0, most=1.0),
            min_p=fields.number("min_p", 0.0, above=False, most=1.0),
        )


class SamplingRows(NamedTuple):
    """Holds the `Sampling` of each sequence of a batch as arrays; `seeds` are two halves, the upper first, `penalties`
    those of presence, frequency and repetition."""

    temperature: Float32[AnyArray, "b"]
    top_k: Int32[AnyArray, "b"]
    top_p: Float32[AnyArray, "b"]
    min_p: Float32[AnyArray, "b"]
    seeds: UInt32[AnyArray, "b 2"]
    penalties: Float32[AnyArray, "b 3"]


def sampling_rows(sampling: Sequence[Sampling], seeds: np.ndarray) -> SamplingRows:
    """Returns the values of each sequence as arrays. `seeds`: uint64, one for each, from `checked_seeds`."""
    # Clipped to float32's normal numbers: a device flushes smaller ones to zero, which would mean greedy
    normal = np.finfo(np.float32)
    temperature = [np.clip(one.temperature, normal.tiny, normal.max) if one.temperature else 0.0 for one in sampling]
    return SamplingRows(
        np.array(temperature, np.float32),
        np.array([min(one.top_k, MAX_TOP_K) for one in sampling], np.int32),
        np.array([one.top_p for one in sampling], np.float32),
        np.array([one.min_p for one in sampling], np.float32),
        np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1).astype(np.uint32),
        np.array([one.penalties for one in sampling], np.float32),
    )


def checked_seeds(seed: int | ArrayLike, rows: int) -> np.ndarray:
    """Returns one seed for all rows, or one for each, as uint64 [rows].

    Raises ValueError for anything but integers from 0 to 2**63 - 1, and for another number of seeds.
    """
    values = integers("seeds", seed)
    if values.shape not in ((), (rows,)):
        raise ValueError(f"seeds have shape {values.shape}, expected one seed, or one for each of {rows} rows")
    if values.size and (values.min() < 0 or values.max() >= SEEDS):
        raise ValueError(f"seeds lie between {values.min()} and {values.max()}, expected 0 to 2**63 - 1")
    return np.broadcast_to(values.astype(np.uint64), (rows,))
