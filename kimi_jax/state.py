"""What decoding carries from call to call.

An MLA layer keeps the compressed latents of every token, in pages (`pallas_kernels.mla_attention`): `kv_lora_rank +
qk_rope_head_dim` values a token, never expanded heads. A KDA layer keeps its float32 state and the raw projections of
the last `short_conv_kernel_size - 1` tokens. Everything is a pytree, donated to each step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from kimi_jax.axes import Array, Float, Float32, Lengths, PageTable
from kimi_jax.config import KimiConfig
from sharding import tree_specs

PAGE = 128


class MLACache(NamedTuple):
    """Pages of latents, channels major: a row of 576 would be padded to 640 on a TPU."""

    pages: Float[Array, "pages c page"]


class KDAState(NamedTuple):
    """`tail`: the last raw projections q, k and v (before convolution and SiLU), side by side; `S`: keys x values."""

    tail: Float[Array, "b taps channels"]
    S: Float32[Array, "b h k v"]


class State(NamedTuple):
    """`lengths`: tokens held per row. `page_table`: the pages of each row, in order, shared by all layers.

    On a mesh a row's pages lie where the row does, in turn over the devices of the `sequence` axis
    (`sharding.page_ring`); a device's part of the table numbers the pages of its own part.
    """

    lengths: Lengths
    page_table: PageTable
    layers: tuple[MLACache | KDAState, ...]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.page_table.shape[1] * PAGE


def empty(
    config: KimiConfig,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
) -> State:
    """A state of `batch` rows that can hold `capacity` tokens each (rounded up to whole pages), latents in `dtype`.

    Raises ValueError where the batch does not divide by the mesh's `data` axis.
    """
    text = config.text
    data, sequence = (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["sequence"])
    if batch % data:
        raise ValueError(f"a batch of {batch} rows cannot be sharded over a data axis of {data}")
    row_pages = -(-capacity // (PAGE * sequence)) * sequence

    part = jnp.arange(batch // data * row_pages // sequence, dtype=jnp.int32)

    def layer(kind: str) -> MLACache | KDAState:
        if kind == "mla":
            return MLACache(jnp.zeros((batch * row_pages, text.latent_dim, PAGE), dtype))
        kda = text.linear_attn
        assert kda is not None
        taps = (batch, kda.short_conv_kernel_size - 1, 3 * kda.num_heads * kda.head_dim)
        return KDAState(
            jnp.zeros(taps, dtype), jnp.zeros((batch, kda.num_heads, kda.head_dim, kda.head_dim), jnp.float32)
        )

    return State(
        lengths=jnp.zeros(batch, jnp.int32),
        page_table=jnp.tile(part.reshape(batch // data, -1), (data, sequence)),
        layers=tuple(layer(kind) for kind in text.layer_kinds),
    )


def specs(state: State, mesh: Mesh | AbstractMesh | None = None) -> Any:
    """The PartitionSpec of every array of a state, on the mesh in use where none is given."""

    mla: Any = MLACache(("pages", None, None))  # type: ignore[arg-type]
    kda: Any = KDAState(("batch", None, "kda_heads"), ("batch", "kda_heads", None, None))  # type: ignore[arg-type]
    layers = tuple(mla if isinstance(kept, MLACache) else kda for kept in state.layers)
    axes = State(("batch",), ("batch", "row_pages"), layers)  # type: ignore[arg-type]
    return tree_specs(state, axes, mesh)
