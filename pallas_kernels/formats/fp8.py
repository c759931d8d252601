"""FP8 weights in blocks of 128 x 128: DeepSeek-V3's (arXiv 2412.19437, section 3.3), for NumPy and for JAX arrays.

e4m3, and for each block scale_inv = amax / 448 in float32; a number is w / scale_inv, the float32 quotient, rounded
half to even, and is read back as w * scale_inv, the product in float32. The last blocks of a dimension that 128 does
not divide are smaller. Kernels do not compute in FP8: ops dequantise it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.formats.arrays import BF16, AnyArray, divide, namespace
from pallas_kernels.formats.format import Part, Shape, Weight

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128
LARGEST = 448

_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
with np.errstate(invalid="ignore"):  # NaNs are among the 65,536
    _OF_BF16 = np.arange(65536, dtype=np.uint16).view(BF16).astype(np.float32).astype(E4M3).view(np.uint8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8(Weight):
    """`weight` e4m3 [..., out, in] and `weight_scale_inv` float32 [..., ceil(out/128), ceil(in/128)]; constants."""

    weight: Any
    weight_scale_inv: Any

    parts = stored = (
        Part("weight", E4M3),
        Part("weight_scale_inv", jnp.float32, (BLOCK, BLOCK), sharded=False),
    )

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Quantises a weight."""
        return cls(*quantize(jnp.asarray(weight)))

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns float32(weight) * scale_inv, rounded once to `dtype`."""
        return dequantize(self.weight, self.weight_scale_inv, dtype or self.dtype)


def quantize(weight: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Returns e4m3 [..., out, in] and scale_inv float32 [..., ceil(out/128), ceil(in/128)].

    A block of zeros has the scale 0. A block that is not finite has a scale that is not.
    """
    xp = namespace(weight)
    values = weight.astype(xp.float32)
    scales = divide(_block_max(xp.abs(values)), LARGEST)
    quotients = divide(values, spread_scales(xp.where(scales == 0, 1, scales).astype(xp.float32), weight.shape))
    return _round_to_e4m3(quotients), scales


def dequantize(weight: AnyArray, scale_inv: AnyArray, dtype: DTypeLike = BF16) -> AnyArray:
    """Returns float32(weight) * scale_inv in `dtype`."""
    values = _to_float32(weight)
    values *= spread_scales(scale_inv, weight.shape)
    return values.astype(dtype)


def spread_scales(scales: AnyArray, shape: Shape) -> AnyArray:
    """Repeats each block's scale for each of its weights, [..., out, in]."""
    xp = namespace(scales)
    columns = xp.repeat(scales, BLOCK, axis=-1)[..., : shape[-1]]
    return columns if shape[-2] <= BLOCK else xp.repeat(columns, BLOCK, axis=-2)[..., : shape[-2], :]


def _block_max(values: AnyArray) -> AnyArray:
    """Returns the largest number of each block."""
    xp = namespace(values)
    out, in_ = values.shape[-2:]
    rows = xp.stack([xp.max(values[..., i : i + BLOCK, :], axis=-2) for i in range(0, out, BLOCK)], axis=-2)
    return xp.stack([xp.max(rows[..., i : i + BLOCK], axis=-1) for i in range(0, in_, BLOCK)], axis=-1)


def _to_float32(weight: AnyArray) -> AnyArray:
    if isinstance(weight, jax.Array):
        return weight.astype(jnp.float32)
    return np.take(_VALUES, weight.view(np.uint8))  # several times as fast as NumPy's own conversion


def _round_to_e4m3(values: AnyArray) -> AnyArray:
    # Cut to bf16's bits with the last one set if anything was lost, a number rounds to e4m3's fewer as it would whole.
    # (XLA on CPU rounds by way of float16, which alone would round twice.)
    if isinstance(values, jax.Array):
        bits = lax.bitcast_convert_type(values, jnp.uint32)
        lost = ((bits & 0xFFFF) != 0).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000) | lost, jnp.float32).astype(E4M3)
    bits = values.view(np.uint32)
    cut = (bits >> 16).astype(np.uint16)
    cut |= (bits & 0xFFFF) != 0
    return np.take(_OF_BF16, cut).view(E4M3)
