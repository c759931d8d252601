"""One training step: a pure function of a state and rows, compiled once, with the state donated.

The loss is taken of the numbers that will be published (`quantization.as_published`). After the optimizer's step follow
QK-Clip, with the largest scores of the same batch, and the routers' correction biases, with its loads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from kimi_jax.axes import Array, Float32, Int32
from kimi_jax.config import KimiConfig
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.statistics import Statistics
from kimi_jax.training.adapters import make_adapters, merge_adapters
from kimi_jax.training.initial import initial_optimizer
from kimi_jax.training.leaves import everything, split_trained
from kimi_jax.training.loss import Losses, sum_losses
from kimi_jax.training.microbatches import accumulate
from kimi_jax.training.qk_clip import qk_clip
from kimi_jax.training.quantization import as_published, in_dtype
from kimi_jax.training.router_bias import load_imbalance, update_router_bias
from kimi_jax.training.rows import Rows
from sharding import SINGLE_DEVICE, Partition, array_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run goes on from: the number of steps done (int32), the weights that are trained and the others (the
    routers' correction biases among them), and the optimizer's state."""

    step: Any
    trained: Any
    frozen: Any
    optimizer: Any


class Metrics(NamedTuple):
    """Numbers of one step, over the global batch.

    loss: the mean of the trained positions; accuracy: the share of them where the label has the largest logit.
    gradient_norm: before clipping. largest_logit: over heads and layers, before the step; -inf without MLA.
    imbalance: the largest of the layers' loads over their means; 0 without experts.
    labels: trained positions; tokens: all but padding.
    """

    loss: Float32[Array, ""]
    accuracy: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]
    largest_logit: Float32[Array, ""]
    imbalance: Float32[Array, ""]
    labels: Int32[Array, ""]
    tokens: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Says how a model is trained, beside its optimizer.

    config: the configuration of what is published: with its `quantization`, experts are trained for INT4.
    qk_threshold: tau of QK-Clip. bias_rate: a function from the step's number to gamma of the routers' biases.
    trainable: takes a parameter's name, and tells whether it is trained.
    adapter_rank: the rank of the adapters that are trained in place of what is `trainable`, by `adapters`; 0 for none.
        QK-Clip then has nothing to scale, since the matrices stay as they are.
    microbatches: the number of parts of a step's rows, whose gradients are computed one after another and summed.
    recompute: whether a gradient computes each layer again; without it keeps what it needs, faster in more memory.
    dtype: the dtype that the model computes in, where that is not the masters'.

    Raises ValueError for a model that is published with MXFP4 experts or float32 convolutions, as Kimi K3 is: its
    numbers would be trained for another rounding than theirs.
    """

    config: KimiConfig
    qk_threshold: float = 100.0
    bias_rate: Callable[[Any], Any] = lambda step: 1e-3
    trainable: Callable[[str], bool] = everything
    adapter_rank: int = 0
    microbatches: int = 1
    recompute: bool = True
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        text = self.config.text
        is_mxfp4 = text.quantization is not None and text.quantization.format == "mxfp4"
        if is_mxfp4 or (text.linear_attn is not None and text.linear_attn.float32_weights):
            raise ValueError(
                f"a {self.config.model_type} model, with MXFP4 experts or float32 convolutions, cannot be trained yet"
            )


class Trainer:
    """Trains one model, `Kimi(config.dense())` or one with frozen INT4 experts, by an optimizer of `training`.

    `partition` is that of the weights. `state` is where a run begins; `step` donates the state that it is given.
    """

    def __init__(
        self,
        model: Kimi,
        make_optimizer: Callable[[Any], optax.GradientTransformation],
        recipe: Recipe,
        partition: Partition = SINGLE_DEVICE,
    ):
        self.recipe, self.partition = recipe, partition
        self.graph, trained, frozen = split_trained(model, recipe.trainable)
        if recipe.adapter_rank:
            frozen = nnx.merge_state(trained, frozen)
            trained = make_adapters(trained, recipe.adapter_rank, partition)
        self.optimizer = make_optimizer(trained)
        mesh = array_mesh(model.model.embed_tokens.weight.get_value())
        number, begun = initial_optimizer(self.optimizer, trained, mesh)
        self.state = TrainState(number, trained, frozen, begun)
        self.step: Any = jax.jit(self._step, donate_argnums=0)

    def model(self, state: TrainState) -> Kimi:
        """Returns the model with a state's weights, unrounded, adapters merged into them."""
        return nnx.merge(self.graph, *self._weights(state.trained, state.frozen))

    def _weights(self, trained: Any, frozen: Any) -> tuple[Any, Any]:
        """Returns the weights that training changes, and the others."""
        return merge_adapters(frozen, trained) if self.recipe.adapter_rank else (trained, frozen)

    def _step(self, state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        config, labels = self.recipe.config, jnp.sum(rows.columns >= 0)

        def mean_loss(trained: Any, rows: Rows) -> tuple[jax.Array, Any]:
            changed, others = self._weights(trained, state.frozen)
            model = nnx.merge(self.graph, in_dtype(as_published(changed, config), self.recipe.dtype), others)
            losses, statistics = sum_losses(model, rows, self.partition, recompute=self.recipe.recompute)
            return losses.loss / jnp.maximum(labels, 1), (losses, statistics)

        def differentiate(rows: Rows) -> tuple[Any, tuple[jax.Array, Losses], Statistics]:
            (loss, (losses, seen)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.trained, rows)
            return gradients, (loss, losses), seen

        count = self.recipe.microbatches
        gradients, (loss, losses), seen = accumulate(differentiate, rows, count, self.partition)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trained)
        trained, frozen = optax.apply_updates(state.trained, updates), state.frozen
        if seen.max_logits.size:
            trained = qk_clip(trained, seen.max_logits, config, self.recipe.qk_threshold)
        if seen.expert_counts.size:
            frozen = update_router_bias(frozen, seen.expert_counts, self.recipe.bias_rate(state.step))
        metrics = Metrics(
            loss=loss,
            accuracy=losses.correct / jnp.maximum(labels, 1),
            gradient_norm=optax.tree.norm(gradients),
            largest_logit=jnp.max(seen.max_logits, initial=-jnp.inf),
            imbalance=jnp.max(load_imbalance(seen.expert_counts), initial=0.0),
            labels=labels,
            tokens=jnp.sum(rows.positions >= 0),
        )
        return TrainState(state.step + 1, trained, frozen, optimizer), metrics
