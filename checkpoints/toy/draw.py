"""Draws or copies weights of real size in blocks of rows: bounded memory, and the speed of the disk.

Random bits come from SFC64, whose stream NumPy promises to keep. 16 of them choose one of 65,536 quantiles of the
normal distribution. INT4 codes are drawn as they are stored: four bits choose one of 16 quantiles, the first code of
every group is 7 or -7, and scale = bf16(amax / 7) of a bf16 amax, so that quantising the weights again gives the same.
"""

import math
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist
from zlib import crc32

import numpy as np

from checkpoints.published.numerics import BF16, BLOCK, GROUP_SIZE, quantize_fp8, quantize_mxfp4
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.toy.weights import ToyWeight

BLOCK_WEIGHTS = 2**21  # drawn at a time, in some 50 MB of memory
# A tensor's name, the number of the first row, and the rows.
Block = tuple[str, int, np.ndarray]


@cache
def _quantiles(count: int) -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)], np.float32)


@cache
def _words() -> tuple[np.ndarray, float]:
    """Returns a table from 16 random bits to four stored codes, uint16 [65536], and the standard deviation of a group's
    weights where its amax is 1 on average."""
    codes = np.rint(7 * _quantiles(16) / _quantiles(16)[-1]).astype(np.int64)
    four = np.arange(2**16)[:, None] >> (4 * np.arange(4)) & 15
    return ((codes[four] + 8) << (4 * np.arange(4))).sum(1).astype(np.uint16), (
        (31 * np.square(codes / 7).mean() + 1) / 32 * 49 / 48
    ) ** 0.5


def draw_blocks(weight: ToyWeight, seed: int) -> Iterator[Block]:
    """Yields the tensors of a random `weight`, in blocks of rows, from a generator seeded by (seed, crc32(name))."""
    bits = np.random.SFC64([seed, crc32(weight.name.encode())])
    first, *rest = weight.headers
    if weight.draw != "normal":
        yield first.name, 0, weight.float64(seed).astype(weight.dtype)
        return
    for start, stop in _blocks(weight.shape):
        if weight.form == "int4":
            for header, rows in zip((first, rest[0]), _int4(weight, bits, stop - start), strict=True):
                yield header.name, start, rows
            continue
        size = (stop - start) * math.prod(weight.shape[1:])
        values = np.take(_quantiles(2**16), _random(bits, size)).reshape(stop - start, *weight.shape[1:])
        values *= weight.std[start:stop].astype(np.float32) if isinstance(weight.std, np.ndarray) else weight.std
        values += weight.mean
        if weight.form == "bf16":
            yield first.name, start, values.astype(weight.dtype)
        elif weight.form == "mxfp4":
            for header, rows in zip(weight.headers, quantize_mxfp4(values), strict=True):
                yield header.name, start, rows
        else:
            e4m3, scale = quantize_fp8(values)
            yield first.name, start, e4m3
            yield rest[0].name, start // BLOCK, scale
    if weight.form == "int4":
        yield rest[1].name, 0, np.array(weight.shape, np.int32)


def copy_blocks(weight: ToyWeight, source: Published) -> Iterator[Block]:
    """Yields the tensors of `weight` that `source` has, cut to its shape; raises CheckpointError where it has none."""
    for header in weight.headers:
        tensor = source.tensors.get(header.name)
        rows = tensor and (*header.shape[:1], *tensor.shape[1:]) == header.shape and tensor.shape >= header.shape
        if tensor is None or not rows or tensor.dtype != header.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(
                f"{source.folder}: tensor {header.name}: expected {header.dtype} {list(header.shape)} or more rows, "
                f"found {found}"
            )
        for start, stop in _blocks(header.shape):
            yield header.name, start, source.read(header.name, start, stop)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields the starts and stops of blocks of rows that are whole blocks of FP8."""
    rows = max(BLOCK_WEIGHTS // math.prod(shape[1:]) // BLOCK, 1) * BLOCK
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _random(bits: np.random.SFC64, size: int) -> np.ndarray:
    """Returns random bits, uint16 [size]."""
    return bits.random_raw(-(-size // 4)).view(np.uint16)[:size]


def _int4(weight: ToyWeight, bits: np.random.SFC64, rows: int) -> tuple[np.ndarray, np.ndarray]:
    codes, deviation = _words()
    columns = weight.shape[1]
    quarters = np.take(codes, _random(bits, rows * columns // 4)).reshape(rows, -1, GROUP_SIZE // 4)
    first = quarters[:, :, 0]
    quarters[:, :, 0] = first & 0xFFF0 | (first >> 3 & 1) * 14 + 1  # 15 or 1, by its sign
    spread = 0.75 + 0.5 / 2**16 * _random(bits, rows * columns // GROUP_SIZE)
    amax = (spread * (weight.std / deviation)).astype(np.float32).astype(BF16)
    scale = (amax.astype(np.float32) / np.float32(7)).astype(BF16)
    return quarters.view(np.int32).reshape(rows, -1), scale.reshape(rows, -1)
