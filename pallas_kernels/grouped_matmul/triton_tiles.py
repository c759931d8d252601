"""Tiles of a group's matrix inside a Pallas-Triton kernel, for each format: what a program reads, and its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.formats import Dense, Int4, Weight
from pallas_kernels.formats.int4_codec import GROUP_SIZE

# A tile's outputs and a turn's inputs make whole lines of the cache, 128 bytes, of dense weights.
OUTPUTS, INPUTS = 64, 64
# Codes take a quarter of the bytes: with few rows, twice as many keep enough of them on the way from memory. With more
# rows they would spill.
INT4_INPUTS, FEW_ROWS = 128, 32
# Triton takes a place among codes as an int32, and half of these as negative.
MOST_CODE_BYTES = 2**31


@dataclass(frozen=True)
class DenseTile:
    """`OUTPUTS` of matrices [outputs, inputs], of which a turn takes `inputs`."""

    inputs: int

    arrays = len(Dense.parts)

    @classmethod
    def choose(cls, weight: Dense, rows: int) -> "DenseTile":
        """Returns the tile for programs that multiply so many rows."""
        return cls(INPUTS)

    @staticmethod
    def unsupported(weight: Dense) -> str | None:
        """Says why the kernel cannot take these matrices; None where it can."""
        N, K = weight.shape[1:]
        if N % OUTPUTS or K % INPUTS:
            return f"weights are [{N}, {K}], expected multiples of {OUTPUTS} and {INPUTS}"
        return None

    def specs(self, weight: Dense) -> list[pl.BlockSpec]:
        """Returns the BlockSpec of all groups' tiles, in a grid (tiles, visits)."""
        groups, _, K = weight.shape
        return [pl.BlockSpec((groups, OUTPUTS, K), lambda n, v: (0, n, 0))]

    def load(self, refs: Sequence[Any], group: Array, turn: Array, dtype: Any) -> Array:
        """Returns the turn's numbers of the group's tile, [inputs, OUTPUTS]."""
        (weight,) = refs
        return weight[group, :, pl.ds(turn * self.inputs, self.inputs)].T


@dataclass(frozen=True)
class Int4Tile:
    """`OUTPUTS` of codes [inputs, outputs] with scales, of which a turn takes `inputs`, some groups of 32."""

    inputs: int

    arrays = len(Int4.parts)

    @classmethod
    def choose(cls, weight: Int4, rows: int) -> "Int4Tile":
        """Returns the tile for programs that multiply so many rows."""
        most = INT4_INPUTS if rows <= FEW_ROWS else INPUTS
        return cls(next(size for size in (most, INPUTS, GROUP_SIZE) if weight.shape[-1] % size == 0))

    @staticmethod
    def unsupported(weight: Int4) -> str | None:
        """Says why the kernel cannot take these matrices; None where it can."""
        groups, N, K = weight.shape
        if N % OUTPUTS:
            return f"weights are [{N}, {K}], expected a multiple of {OUTPUTS} outputs"
        if groups * N * K // 2 > MOST_CODE_BYTES:
            return f"codes have {groups * N * K // 2:,} bytes, expected at most {MOST_CODE_BYTES:,}"
        return None

    def specs(self, weight: Int4) -> list[pl.BlockSpec]:
        """Returns the BlockSpecs of all groups' tiles, in a grid (tiles, visits)."""
        groups, _, K = weight.shape
        return [pl.BlockSpec((groups, rows, OUTPUTS), lambda n, v: (0, 0, n)) for rows in (K, K // GROUP_SIZE)]

    def load(self, refs: Sequence[Any], group: Array, turn: Array, dtype: Any) -> Array:
        """Returns the turn's numbers bf16(code * scale) of the group's tile, [inputs, OUTPUTS]."""
        codes, scales = refs
        scaled_alike = self.inputs // GROUP_SIZE
        taken = codes[group, pl.ds(turn * self.inputs, self.inputs), :].astype(jnp.float32)
        factors = scales[group, pl.ds(turn * scaled_alike, scaled_alike), :].astype(jnp.float32)
        factors = jnp.broadcast_to(factors[:, None], (scaled_alike, GROUP_SIZE, OUTPUTS)).reshape(taken.shape)
        return (taken * factors).astype(jnp.bfloat16).astype(dtype)


# A format without tiles is not for this kernel.
TILES: dict[type[Weight], Any] = {Dense: DenseTile, Int4: Int4Tile}
