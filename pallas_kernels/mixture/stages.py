"""A stage of the mixture's kernel, for each format: rows in vector memory times a tile of an expert's matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.formats import Dense, Int4, Weight
from pallas_kernels.formats.int4_codec import GROUP_SIZE
from pallas_kernels.grouped_matmul import mosaic_int4 as int4
from pallas_kernels.grouped_matmul.int4_product import (
    FEW_ROWS,
    GroupRows,
    MatrixOperand,
    Tiles,
    add_products,
    int4_code,
    scale_rows,
)
from pallas_kernels.hardware import LANES, chip

# Rows multiplied at once: more than most experts of a decode step have.
WINDOW = 16
# Bytes of a step's tiles, and weights unpacked at a time: twice as many gain 1 to 6 % and take the compiler twice as
# long.
STEP_BYTES, PART_WEIGHTS = 2**22, 2**21


@dataclass(frozen=True)
class Int4Stage:
    """INT4 matrices [inputs, outputs] of `num_local` experts, of which a step takes `tile` outputs.

    With `few`, groups of few rows are multiplied in block-diagonal form; with `bf16`, the chip multiplies bf16. See
    `int4_grouped_matmul`.
    """

    num_local: int
    inputs: int
    outputs: int
    tiles: Tiles
    dtype: Any
    few: bool
    bf16: bool

    arrays = len(Int4.parts)  # that a matrix consists of

    @classmethod
    def choose(cls, weight: Int4, dtype: Any, matrices: int) -> "Int4Stage":
        """Returns the stage for a matrix like `weight`, where a step takes a tile of each of `matrices` such ones."""
        num_local, N, K = weight.shape
        tile = int4.tiles(WINDOW, K, N, 1, dtype, STEP_BYTES // matrices, PART_WEIGHTS)
        return cls(num_local, K, N, tile, dtype, int4.uses_block_diagonal(tile, dtype), chip().bf16_vpu)

    @staticmethod
    def unsupported(weight: Int4) -> str | None:
        """Says why the kernel cannot take this matrix; None where it can."""
        return int4.unsupported(jnp.zeros((1, weight.shape[-1]), jnp.bfloat16), weight)

    @property
    def tile(self) -> int:
        return self.tiles.N

    def specs(self, at: Callable[..., tuple[Array, Array]]) -> list[pl.BlockSpec]:
        """Returns the BlockSpecs of a matrix's arrays; `at` maps a place in the grid to an expert and a tile."""

        def block(rows: int) -> pl.BlockSpec:
            def index(*grid: Any) -> tuple[Array, int, Array]:
                expert, tile = at(*grid)
                return expert, 0, tile

            return pl.BlockSpec((None, rows, self.tile), index)

        return [block(self.inputs), block(self.inputs // GROUP_SIZE)]

    def scratch(self, matrices: int) -> list[Any]:
        """Returns the scratch that `add` needs for so many matrices."""
        return [scale_rows(self.tiles, self.bf16)] * matrices

    def add(
        self, rows_ref: Any, count: Array, weights: Sequence[Any], totals: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Adds the first `count` rows of [rows, inputs] times each matrix to its total [rows, tile], all float32."""
        operands = [
            MatrixOperand(codes, scales, total, scale_rows)
            for (codes, scales), total, scale_rows in zip(weights, totals, scratch, strict=True)
        ]
        rows = GroupRows(
            lambda first, size, inputs: rows_ref[pl.ds(first, size), inputs],
            low=0,
            high=pl.cdiv(count, WINDOW),
            first_few=0,
            few=(count > 0) & (count <= FEW_ROWS),
        )
        code, how = int4_code(chip()), {"dtype": self.dtype, "bf16": self.bf16}
        add_products(rows, operands, None, self.tiles, code, few=self.few, more=True, **how)


@dataclass(frozen=True)
class DenseStage:
    """Matrices [outputs, inputs] of `num_local` experts, of which a step takes `tile` outputs; see `grouped_matmul`."""

    num_local: int
    inputs: int
    outputs: int
    tile: int
    dtype: Any

    arrays = len(Dense.parts)

    @classmethod
    def choose(cls, weight: Dense, dtype: Any, matrices: int) -> "DenseStage":
        """Returns the stage for a matrix like `weight`, where a step takes a tile of each of `matrices` such ones."""
        num_local, N, K = weight.shape
        bytes_each = K * weight.dtype.itemsize * matrices
        fit = [n for n in range(LANES, N + 1, LANES) if N % n == 0 and (n == LANES or n * bytes_each <= STEP_BYTES)]
        return cls(num_local, K, N, max(fit), dtype)

    @staticmethod
    def unsupported(weight: Dense) -> str | None:
        """Says why the kernel cannot take this matrix; None where it can."""
        N, K = weight.shape[1:]
        return f"weights are [{N}, {K}], expected multiples of {LANES}" if N % LANES or K % LANES else None

    def specs(self, at: Callable[..., tuple[Array, Array]]) -> list[pl.BlockSpec]:
        """Returns the BlockSpec of a matrix; `at` maps a place in the grid to an expert and a tile."""

        def index(*grid: Any) -> tuple[Array, Array, int]:
            return *at(*grid), 0

        return [pl.BlockSpec((None, self.tile, self.inputs), index)]

    def scratch(self, matrices: int) -> list[Any]:
        """Returns no scratch: `add` needs none."""
        return []

    def add(
        self, rows_ref: Any, count: Array, weights: Sequence[Any], totals: Sequence[Any], scratch: Sequence[Any]
    ) -> None:
        """Adds the first `count` rows of [rows, inputs] times each matrix to its total [rows, tile], all float32."""
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT
        contract_last = (((1,), (1,)), ((), ()))

        def window(i: Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(i * WINDOW, WINDOW), WINDOW)
            left = rows_ref[rows, :].astype(self.dtype)
            for (weight,), total in zip(weights, totals, strict=True):
                total[rows, :] += lax.dot_general(
                    left, weight[...], contract_last, precision=precision, preferred_element_type=jnp.float32
                )

        lax.fori_loop(0, pl.cdiv(count, WINDOW), window, None)


# A format without a stage is not for this kernel.
STAGES: dict[type[Weight], Any] = {Dense: DenseStage, Int4: Int4Stage}
