"""The tensors that hold a weight, by the endings of their names, which only the formats know.

INT4 has words, scales and a shape; MXFP4 has bytes and scales; FP8 has e4m3 and scales; a plain weight is one tensor.
The same endings are those of stored leaves.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.formats import Dense, Fp8, Int4, Mxfp4, Part, Weight
from pallas_kernels.formats.mxfp4 import NAN_SCALE

# Those of one ending are told apart by dtype; a plain weight has any.
_FORMATS: tuple[type[Weight], ...] = (Int4, Mxfp4, Fp8, Dense)
_SCALES = tuple(f".{part.name}" for weight_format in _FORMATS for part in weight_format.stored[1:])
# Formats of routed experts alone, which a model computes in.
PACKED: tuple[type[Weight], ...] = (Int4, Mxfp4)


class WeightPart(NamedTuple):
    """A tensor of a weight: the weight's name without any ending, its format, and the part of it that the tensor is."""

    stem: str
    format: type[Weight]
    part: Part

    @property
    def name(self) -> str:
        """The name that the weight has as a plain one."""
        return f"{self.stem}.{Dense.stored[0].name}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors that hold the weight, codes before scales."""
        return tuple(f"{self.stem}.{part.name}" for part in self.format.stored)

    @property
    def is_first(self) -> bool:
        """True if the tensor has the codes, or all of a plain weight."""
        return self.part is self.format.stored[0]


def weight_part(name: str, dtype: Any) -> WeightPart | None:
    """Returns the part of a weight that a tensor is, None for a bias and other tensors that are no matrix of a Linear's
    kind."""
    stem, _, ending = name.rpartition(".")
    for weight_format in _FORMATS:
        for part in weight_format.stored:
            if part.name == ending and (part.dtype is None or part.dtype == dtype):
                return WeightPart(stem, weight_format, part)
    return None


def packed_format(tensors: Iterable[tuple[str, Any]]) -> type[Weight] | None:
    """Returns the packed format of the first of `tensors`, names with their dtypes, that has one; None for none."""
    parts = (weight_part(name, dtype) for name, dtype in tensors)
    return next((part.format for part in parts if part is not None and part.format in PACKED), None)


def is_scales(name: str) -> bool:
    """Tells whether a tensor has the scales of a quantised weight."""
    return name.endswith(_SCALES)


def shape_name(name: str, dtype: Any) -> str | None:
    """Returns the name of the tensor beside INT4 words that says the weight's shape; None for other tensors."""
    part = weight_part(name, dtype)
    return f"{part.stem}.{part.format.stored_shape}" if part and part.is_first and part.format.stored_shape else None


def bad_scales(name: str, scales: np.ndarray) -> tuple[int, str] | None:
    """Returns the first row of scales with one that is no number, and words for it; None where all are finite."""
    if scales.dtype == Mxfp4.stored[1].dtype:
        bad, words = scales == NAN_SCALE, f"that is {NAN_SCALE}, which stands for NaN"
    else:
        bad, words = ~np.isfinite(scales.astype(np.float32)), "that is not finite"
    return (int(np.argwhere(bad)[0][0]), words) if is_scales(name) and bad.any() else None


def is_shape(name: str) -> bool:
    """Tells whether a tensor says a weight's shape."""
    return name.endswith(f".{Int4.stored_shape}")
