"""The tensors that hold a weight, by the endings of their names, which only the formats know.

INT4 has words, scales and a shape; FP8 has e4m3 and scales; a plain weight is one tensor. The same endings are those of
stored leaves.
"""

from typing import Any, NamedTuple

from pallas_kernels.formats import Dense, Fp8, Int4, Part, Weight

# Those of one ending are told apart by dtype; a plain weight has any.
_FORMATS: tuple[type[Weight], ...] = (Int4, Fp8, Dense)
_SCALES = tuple(f".{part.name}" for weight_format in _FORMATS for part in weight_format.stored[1:])
_WORDS = f".{Int4.stored[0].name}"


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


def is_words(name: str) -> bool:
    """Tells whether a tensor has INT4 words."""
    return name.endswith(_WORDS)


def is_scales(name: str) -> bool:
    """Tells whether a tensor has the scales of a quantised weight."""
    return name.endswith(_SCALES)


def shape_name(name: str) -> str | None:
    """Returns the name of the tensor beside INT4 words that says the weight's shape; None for other tensors."""
    return f"{name.removesuffix(_WORDS)}.{Int4.stored_shape}" if is_words(name) else None


def is_shape(name: str) -> bool:
    """Tells whether a tensor says a weight's shape."""
    return name.endswith(f".{Int4.stored_shape}")
