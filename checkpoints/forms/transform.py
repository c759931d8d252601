"""Turns a weight from one stored form into another, through bf16, by rows."""

from collections.abc import Iterator, Sequence

import numpy as np

from checkpoints.published.numerics import (
    BF16,
    BLOCK,
    F32,
    FP8,
    INT32,
    UINT8,
    dequantize_fp8,
    dequantize_int4,
    dequantize_mxfp4,
    quantize_fp8,
    quantize_int4,
    quantize_mxfp4,
)

_QUANTIZED = (INT32, UINT8, FP8)
SCRATCH_BYTES = 20 * BLOCK  # per column, what `transform` holds beside its arguments and results


def transform(arrays: Sequence[np.ndarray], dtypes: Sequence[np.dtype], *, skip: int = 0) -> tuple[np.ndarray, ...]:
    """Returns the weight `arrays` as arrays of `dtypes`. Either is one of: floats; (int32 words, bf16 scales);
    (uint8 bytes, uint8 scales); (e4m3, float32 scales). Between two of them a weight is rounded to bf16; where it ends
    in plain floats, it is rounded once, to those. `skip` says how many rows of the first FP8 block are not there.

    Raises ValueError for a weight or scale that is not finite, where a scale is made or used.
    """
    first = arrays[0]
    if first.dtype not in _QUANTIZED and dtypes[0] not in _QUANTIZED:
        return (first.astype(dtypes[0]),)
    parts = [_quantize(rows, dtypes[0]) for rows in plain_rows(arrays, skip, F32 if dtypes[0] == F32 else BF16)]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def plain_rows(arrays: Sequence[np.ndarray], skip: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields the weight in bf16 (all but INT4 also in float32), `BLOCK` rows at a time, at first `skip` fewer."""
    first, *scales = arrays
    starts = [0, *range(BLOCK - skip, first.shape[0], BLOCK)]
    for i, start in enumerate(starts):
        rows = slice(start, starts[i + 1] if i + 1 < len(starts) else None)
        if first.dtype == INT32:
            yield dequantize_int4(first[rows], scales[0][rows])
        elif first.dtype == UINT8:
            yield dequantize_mxfp4(first[rows], scales[0][rows], dtype)
        elif first.dtype == FP8:
            yield dequantize_fp8(first[rows], scales[0][i : i + 1], dtype)
        else:
            yield first[rows].astype(dtype)


def _quantize(rows: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    if dtype == INT32:
        return quantize_int4(rows)
    if dtype == UINT8:
        return quantize_mxfp4(rows)
    if dtype == FP8:
        return quantize_fp8(rows)
    assert dtype in (BF16, F32)
    return (rows.astype(dtype),)
