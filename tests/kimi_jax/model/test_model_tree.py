"""The tree of a whole model: its names against the released tensors, its sizes, its random start and its gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.stored.names import stored_leaves
from checkpoints.toy import toy_config
from kimi_jax import Kimi
from kimi_jax.config_json import from_dict, preset
from kimi_jax.model.kimi import abstract

abstract_preset = cache(lambda name: abstract(preset(name)))


# --- names and sizes of the published models --------------------------------------------------------------------------


def linear(name, *shape):
    return {f"{name}.weight": shape}


def glu(prefix, hidden, width, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return linear(gate, width, hidden) | linear(up, width, hidden) | linear(down, hidden, width)


def int4_experts(prefix, hidden, width, experts):
    tensors = {}
    for e in range(experts):
        for name, out, in_ in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
            tensors[f"{prefix}.{e}.{name}.weight_packed"] = (out, in_ // 8)
            tensors[f"{prefix}.{e}.{name}.weight_scale"] = (out, in_ // 32)
    return tensors


def ends(vocab, hidden):
    embeddings = linear("model.embed_tokens", vocab, hidden) | linear("lm_head", vocab, hidden)
    return embeddings | linear("model.norm", hidden)


def mla(prefix, hidden, heads):
    return {
        f"{prefix}.kv_a_proj_with_mqa.weight": (576, hidden),
        f"{prefix}.kv_a_layernorm.weight": (512,),
        f"{prefix}.kv_b_proj.weight": (heads * 256, 512),
        f"{prefix}.o_proj.weight": (hidden, heads * 128),
    }


def k2_tensors(*, int4):
    """Returns the names and shapes of K2's released tensors, without `weight_shape` and without prefix."""
    tensors = ends(163840, 7168)
    for i in range(61):
        layer = f"model.layers.{i}"
        tensors |= linear(f"{layer}.input_layernorm", 7168) | linear(f"{layer}.post_attention_layernorm", 7168)
        attention = f"{layer}.self_attn"
        tensors |= mla(attention, 7168, 64) | linear(f"{attention}.q_a_proj", 1536, 7168)
        tensors |= linear(f"{attention}.q_a_layernorm", 1536) | linear(f"{attention}.q_b_proj", 12288, 1536)
        if i == 0:
            tensors |= glu(f"{layer}.mlp", 7168, 18432)
            continue
        tensors |= linear(f"{layer}.mlp.gate", 384, 7168) | {f"{layer}.mlp.gate.e_score_correction_bias": (384,)}
        tensors |= glu(f"{layer}.mlp.shared_experts", 7168, 2048)
        experts = f"{layer}.mlp.experts"
        if int4:
            tensors |= int4_experts(experts, 7168, 2048, 384)
        else:
            for e in range(384):
                tensors |= glu(f"{experts}.{e}", 7168, 2048)
    return tensors


def vision_tensors():
    """Returns the names and shapes of K2.5's released vision tower and projector: 329 + 6 tensors."""

    def biased(name, out, *rest):
        return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}

    tower = "vision_tower"
    tensors = biased(f"{tower}.patch_embed.proj", 1152, 3, 14, 14)
    tensors |= linear(f"{tower}.patch_embed.pos_emb", 64, 64, 1152)
    for i in range(27):
        block = f"{tower}.encoder.blocks.{i}"
        tensors |= biased(f"{block}.norm0", 1152) | biased(f"{block}.norm1", 1152)
        tensors |= biased(f"{block}.wqkv", 3456, 1152) | biased(f"{block}.wo", 1152, 1152)
        tensors |= biased(f"{block}.mlp.fc0", 4304, 1152) | biased(f"{block}.mlp.fc1", 1152, 4304)
    tensors |= biased(f"{tower}.encoder.final_layernorm", 1152) | biased("mm_projector.pre_norm", 1152)
    return tensors | biased("mm_projector.proj.0", 4608, 4608) | biased("mm_projector.proj.2", 7168, 4608)


def kimi_linear_tensors():
    """Returns the names and shapes of Kimi Linear's released tensors, with `A_log` in its newer shape [32]."""
    tensors = ends(163840, 2304)
    for i in range(27):
        layer = f"model.layers.{i}"
        tensors |= linear(f"{layer}.input_layernorm", 2304) | linear(f"{layer}.post_attention_layernorm", 2304)
        attention = f"{layer}.self_attn"
        if i in (3, 7, 11, 15, 19, 23, 26):
            tensors |= mla(attention, 2304, 32) | linear(f"{attention}.q_proj", 6144, 2304)
        else:
            for name in "qkv":
                tensors |= linear(f"{attention}.{name}_proj", 4096, 2304)
                tensors |= linear(f"{attention}.{name}_conv1d", 4096, 1, 4)
            for name in "fg":
                tensors |= linear(f"{attention}.{name}_a_proj", 128, 2304)
                tensors |= linear(f"{attention}.{name}_b_proj", 4096, 128)
            tensors |= {f"{attention}.A_log": (32,), f"{attention}.dt_bias": (4096,)}
            tensors |= linear(f"{attention}.b_proj", 32, 2304) | linear(f"{attention}.o_norm", 128)
            tensors |= linear(f"{attention}.o_proj", 2304, 4096)
        if i == 0:
            tensors |= glu(f"{layer}.mlp", 2304, 9216)
            continue
        moe = f"{layer}.block_sparse_moe"
        tensors |= linear(f"{moe}.gate", 256, 2304) | {f"{moe}.gate.e_score_correction_bias": (256,)}
        tensors |= glu(f"{moe}.shared_experts", 2304, 1024)
        for e in range(256):
            tensors |= glu(f"{moe}.experts.{e}", 2304, 1024, ("w1", "w3", "w2"))
    return tensors


def k3_tensors():
    """Returns the names and shapes of Kimi K3's released tensors, without prefix."""
    tensors = ends(163840, 7168) | k3_residual("model.output_attn_res")
    for i in range(93):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        tensors |= linear(f"{layer}.input_layernorm", 7168) | linear(f"{layer}.post_attention_layernorm", 7168)
        tensors |= k3_residual(f"{layer}.self_attention_res") | k3_residual(f"{layer}.mlp_res")
        tensors |= linear(f"{attention}.g_proj", 12288, 7168)
        if i % 4 == 3 or i == 92:
            tensors |= mla(attention, 7168, 96) | linear(f"{attention}.q_a_proj", 1536, 7168)
            tensors |= linear(f"{attention}.q_a_layernorm", 1536) | linear(f"{attention}.q_b_proj", 18432, 1536)
        else:
            for name in "qkv":
                tensors |= linear(f"{attention}.{name}_proj", 12288, 7168)
                tensors |= linear(f"{attention}.{name}_conv1d", 12288, 1, 4)
            tensors |= linear(f"{attention}.f_a_proj", 128, 7168) | linear(f"{attention}.f_b_proj", 12288, 128)
            tensors |= {f"{attention}.A_log": (128,), f"{attention}.dt_bias": (12288,)}
            tensors |= linear(f"{attention}.b_proj", 96, 7168) | linear(f"{attention}.o_norm", 128)
            tensors |= linear(f"{attention}.o_proj", 7168, 12288)
        if i == 0:
            tensors |= glu(f"{layer}.mlp", 7168, 33792)
            continue
        moe = f"{layer}.block_sparse_moe"
        tensors |= linear(f"{moe}.gate", 896, 7168) | {f"{moe}.gate.e_score_correction_bias": (896,)}
        tensors |= glu(f"{moe}.shared_experts", 7168, 6144) | linear(f"{moe}.routed_expert_norm", 3584)
        tensors |= linear(f"{moe}.routed_expert_down_proj", 3584, 7168)
        tensors |= linear(f"{moe}.routed_expert_up_proj", 7168, 3584)
        for e in range(896):
            for name, out, in_ in (("w1", 3072, 3584), ("w3", 3072, 3584), ("w2", 3584, 3072)):
                tensors[f"{moe}.experts.{e}.{name}.weight_packed"] = (out, in_ // 2)
                tensors[f"{moe}.experts.{e}.{name}.weight_scale"] = (out, in_ // 32)
    return tensors | k3_vision_tensors()


def k3_residual(prefix):
    return linear(f"{prefix}_norm", 7168) | linear(f"{prefix}_proj", 1, 7168)


def k3_vision_tensors():
    """Returns the names and shapes of Kimi K3's released vision tower and projector: 165 + 3 tensors."""
    tower = "vision_tower"
    tensors = linear(f"{tower}.patch_embed.proj", 1024, 3, 14, 14)
    tensors |= linear(f"{tower}.patch_embed.pos_emb", 64, 64, 1024)
    for i in range(27):
        block = f"{tower}.encoder.blocks.{i}"
        tensors |= linear(f"{block}.norm0", 1024) | linear(f"{block}.norm1", 1024)
        tensors |= linear(f"{block}.wqkv", 4608, 1024) | linear(f"{block}.wo", 1024, 1536)
        tensors |= linear(f"{block}.mlp.fc0", 4096, 1024) | linear(f"{block}.mlp.fc1", 1024, 4096)
    tensors |= linear(f"{tower}.encoder.final_layernorm", 1024) | linear("mm_projector.post_norm", 7168)
    return tensors | linear("mm_projector.proj.0", 4096, 4096) | linear("mm_projector.proj.2", 7168, 4096)


PUBLISHED = {
    "kimi-k3": k3_tensors,
    "kimi-k2.5": lambda: k2_tensors(int4=True) | vision_tensors(),
    "kimi-k2-thinking": lambda: k2_tensors(int4=True),
    "kimi-k2": lambda: k2_tensors(int4=False),
    "kimi-linear-48b": kimi_linear_tensors,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tree_is_the_published_table(name):
    expected = PUBLISHED[name]()
    found: dict[str, tuple[int, ...]] = {}
    for leaf in stored_leaves(abstract_preset(name)):
        found |= dict.fromkeys(leaf.names, leaf.shape[1:] if leaf.stacked else leaf.shape)
    assert sorted(expected.keys() ^ found.keys())[:5] == []
    assert [(tensor, shape, found[tensor]) for tensor, shape in expected.items() if found[tensor] != shape] == []


def test_attributes_are_published_names():
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(abstract_preset("kimi-k2.5")))}
    published = {name for name in PUBLISHED["kimi-k2.5"]() if ".experts." not in name}
    assert {path for path in paths if ".experts." not in path} == published
    assert len([name for name in published if not name.startswith(("model.", "lm_head"))]) == 335


def test_float32_where_the_published_files_have_it():
    for name, endings in (
        ("kimi-k2.5", {"e_score_correction_bias"}),
        ("kimi-linear-48b", {"e_score_correction_bias", "A_log", "dt_bias"}),
    ):
        flat = nnx.to_flat_state(nnx.state(abstract_preset(name)))
        assert {path[-1] for path, variable in flat if variable.dtype == jnp.float32} == endings
        assert {str(v.dtype) for _, v in flat} == {"bfloat16", "float32"} | ({"int4"} if name == "kimi-k2.5" else set())
    leaves = stored_leaves(abstract_preset("kimi-k3"))
    wide = {leaf.path.split(".", 3)[-1] for leaf in leaves if leaf.dtype == np.float32}
    convolutions = {f"self_attn.{name}_conv1d.weight" for name in "qkv"}
    others = {"self_attn.A_log", "self_attn.dt_bias", "self_attn.o_norm.weight", "mlp.gate.e_score_correction_bias"}
    assert wide == convolutions | others


# Weights and stored bytes of the releases. K2 is K2.5's text model in bf16, two bytes a weight; K2-Thinking is K2.5
# without its vision tower of 0.47e9 weights in bf16.
SIZES = {
    "kimi-k2.5": (1.027e12, 595e9),
    "kimi-k2-thinking": (1.027e12 - 0.47e9, 595e9 - 0.9e9),
    "kimi-k2": (1.027e12 - 0.47e9, 2 * (1.027e12 - 0.47e9)),
    "kimi-linear-48b": (49.12e9, 98.2e9),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_bytes(name):
    parameters, nbytes = SIZES[name]
    leaves = [(path[-1], v) for path, v in nnx.to_flat_state(nnx.state(abstract_preset(name)))]
    weights = sum(v.size for ending, v in leaves if ending != "scales")
    stored_bytes = sum(v.size / 2 if v.dtype == jnp.int4 else v.size * v.dtype.itemsize for _, v in leaves)
    assert weights == pytest.approx(parameters, rel=1e-3)
    assert stored_bytes == pytest.approx(nbytes, rel=1e-2)


# --- random models ----------------------------------------------------------------------------------------------------

LAYERS = {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 2, "short_conv_kernel_size": 4}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "initializer_range": 0.2,
}  # fmt: skip
# Every expert is chosen, since a loss jumps where a choice changes, and has no slope there.
TOYS = {
    "k2": toy_config("k2", **SMALL, q_lora_rank=12, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=4),
    "kimi-linear": toy_config(
        "kimi-linear", **SMALL, num_hidden_layers=3, linear_attn_config=LAYERS, num_experts=4, num_experts_per_token=4
    ),
}
STEP = 1e-3
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 768, (2, 12)), jnp.int32)


@jax.numpy_dtype_promotion("standard")  # the INT4 product multiplies bf16 tokens by float32 scales
def test_random_models_run_and_differ_by_seed():
    # Given K2.5's text part with INT4 experts
    text = toy_config("k2.5", **SMALL, q_lora_rank=12, num_hidden_layers=2, n_routed_experts=4)["text_config"]
    first, other = (Kimi(from_dict(text), rngs=nnx.Rngs(seed)) for seed in (0, 1))
    logits = np.asarray(first(TOKENS))
    assert logits.shape == (2, 12, 768) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and np.std(logits) > 0.01
    assert np.abs(np.asarray(other(TOKENS)) - logits).max() > 0.1
    # One seed is one model, and no two of its weights are drawn alike
    same = Kimi(from_dict(text), rngs=nnx.Rngs(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(same), nnx.state(first)))
    drawn = [np.asarray(v).tobytes() for v in jax.tree.leaves(nnx.state(first)) if len(np.unique(np.asarray(v))) > 2]
    assert len(set(drawn)) == len(drawn) > 20
    assert first.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["k2", *(pytest.param(name, marks=pytest.mark.slow) for name in TOYS if name != "k2")])
def test_gradients_reach_every_parameter(name):
    # Given a model in float32 and a loss over all logits
    graph, params = nnx.split(Kimi(from_dict(TOYS[name]), rngs=nnx.Rngs(0), dtype=jnp.float32))
    mark = jnp.asarray(np.random.RandomState(1).standard_normal((2, 12, 768)), jnp.float32)

    def loss(params, tokens):
        return jnp.sum(mark * nnx.merge(graph, params)(tokens)) / 100

    gradients = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(params, TOKENS)))
    assert len(gradients) == len(jax.tree.leaves(params))
    # Then every weight in use has one, for each expert, head and tap (the bias only chooses, and has none)
    for path, variable in gradients.items():
        gradient = np.asarray(variable)
        assert np.isfinite(gradient).all(), path
        if path[-1] == "e_score_correction_bias":
            assert not gradient.any()
        elif "embed_tokens" in path:
            np.testing.assert_array_equal(np.flatnonzero(gradient.any(axis=1)), np.unique(TOKENS))
        else:
            assert np.abs(gradient).max() > 1e-6, path
            assert gradient.reshape(len(gradient), -1).any(axis=1).all(), path
    assert any("conv" in str(path) for path in gradients) == (name == "kimi-linear")
    # And each gradient is the gain of a small step along it
    value, flat = jax.jit(loss), dict(nnx.to_flat_state(params))
    for path, variable in gradients.items():
        gradient = np.asarray(variable, np.float64)
        if path[-1] == "e_score_correction_bias":
            continue
        norm = np.linalg.norm(gradient)
        step = STEP * gradient / norm

        def moved(sign, path=path, step=step):
            changed = flat | {path: flat[path].replace(jnp.asarray(flat[path][...] + sign * step, jnp.float32))}
            return float(value(nnx.from_flat_state(changed), TOKENS))

        slope = (moved(1) - moved(-1)) / (2 * STEP)
        assert slope == pytest.approx(norm, rel=2e-3, abs=3e-3), path  # the loss's float32 rounding over the step
