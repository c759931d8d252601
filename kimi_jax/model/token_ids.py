"""Checks token ids from callers before anything casts them."""

import numpy as np
from numpy.typing import ArrayLike


def integers(name: str, values: int | ArrayLike) -> np.ndarray:
    """Returns the values as an array of integers, in the width that they came in.

    Raises ValueError for anything but whole numbers of at most 64 bits: floats are not rounded, booleans not counted.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: expected an array, found rows of several lengths") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} are {array.dtype}, expected integers of at most 64 bits")
    return array


def token_ids(tokens: ArrayLike, vocab_size: int) -> np.ndarray:
    """Returns token ids [b, t] as int32.

    Raises ValueError for another shape, anything but integers, and ids outside the vocabulary.
    """
    array = integers("tokens", tokens)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"tokens have shape {array.shape}, expected [batch, length] with at least one token")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"token ids lie between {array.min()} and {array.max()}, expected 0 to {vocab_size - 1}")
    return array.astype(np.int32)
