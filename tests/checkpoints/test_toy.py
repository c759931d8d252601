"""Toy checkpoints against the released ones: names, shapes, counts, bytes; drawn whole, and by rows."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints.toy import published_tensors, toy_config, weights, write_toy

FAMILIES = ("k2.5", "k2", "kimi-linear")

K25_FIELDS = {
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_hidden_layers": 27,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
}
LINEAR_FIELDS = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts": 256,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [i for i in range(1, 28) if i not in (4, 8, 12, 16, 20, 24, 27)],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}


def released_tensors(like, **fields):
    """Name -> (shape, dtype, bytes) of the released tensors; weights that are quantised stand for three each."""
    return {t.name: (t.shape, t.dtype.name, t.nbytes) for t in weights(toy_config(like, **fields))}


def test_k25_at_its_real_size_is_the_released_checkpoint():
    config = toy_config("k2.5", **K25_FIELDS)
    tensors = list(weights(config))
    assert sum(3 if t.form == "int4" else 1 for t in tensors) == 208_550
    assert sum(not t.name.startswith("language_model.") for t in tensors) == 335
    quantized = [t for t in tensors if t.form == "int4"]
    assert len(quantized) == 60 * 384 * 3 and all(".mlp.experts." in t.name for t in quantized)
    # gate, up and down of an expert are alike in all
    nbytes = 60 * 384 * sum(t.nbytes for t in quantized[:3]) + sum(t.nbytes for t in tensors if t.form == "bf16")
    assert nbytes / 2**30 == pytest.approx(554.3, abs=0.1)

    shapes = {t.name: t.shape for t in tensors}
    layer = "language_model.model.layers.60"
    expected = {
        "language_model.model.embed_tokens.weight": (163840, 7168),
        "language_model.lm_head.weight": (163840, 7168),
        f"{layer}.self_attn.q_a_proj.weight": (1536, 7168),
        f"{layer}.self_attn.q_b_proj.weight": (12288, 1536),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        f"{layer}.self_attn.kv_b_proj.weight": (16384, 512),
        f"{layer}.self_attn.o_proj.weight": (7168, 8192),
        "language_model.model.layers.0.mlp.gate_proj.weight": (18432, 7168),
        f"{layer}.mlp.gate.weight": (384, 7168),
        f"{layer}.mlp.shared_experts.down_proj.weight": (7168, 2048),
        f"{layer}.mlp.experts.383.down_proj.weight": (7168, 2048),
        "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
        "vision_tower.encoder.blocks.26.wqkv.weight": (3456, 1152),
        "vision_tower.encoder.blocks.26.mlp.fc1.weight": (1152, 4304),
        "mm_projector.pre_norm.bias": (1152,),
        "mm_projector.proj.0.weight": (4608, 4608),
        "mm_projector.proj.2.weight": (7168, 4608),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert {t.name.split(".mlp.")[-1] for t in tensors if t.dtype == np.float32} == {"gate.e_score_correction_bias"}


def test_k25_ids_at_its_real_size_are_the_released_ones():
    config = toy_config("k2.5", **K25_FIELDS)
    named = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad", "media_placeholder")]
    assert named == [163584, 163586, 163839, 163605]
    assert config["text_config"]["eos_token_id"] == 163585  # the two levels differ, as in some releases
    assert toy_config("k2", vocab_size=163840)["eos_token_id"] == 163585
    assert toy_config("kimi-linear", vocab_size=163840)["eos_token_id"] == 163586


def test_kimi_linear_at_its_real_size_is_the_released_checkpoint():
    tensors = released_tensors("kimi-linear", **LINEAR_FIELDS)
    assert len(tensors) == 20_493
    assert sum(nbytes for *_, nbytes in tensors.values()) == pytest.approx(98.2e9, rel=1e-3)
    kda, mla, moe = "model.layers.24.self_attn", "model.layers.26.self_attn", "model.layers.1.block_sparse_moe"
    expected = {
        f"{kda}.q_conv1d.weight": ((4096, 1, 4), "bfloat16"),
        f"{kda}.A_log": ((1, 1, 32, 1), "float32"),
        f"{kda}.dt_bias": ((4096,), "float32"),
        f"{kda}.f_a_proj.weight": ((128, 2304), "bfloat16"),
        f"{kda}.g_b_proj.weight": ((4096, 128), "bfloat16"),
        f"{kda}.b_proj.weight": ((32, 2304), "bfloat16"),
        f"{kda}.o_norm.weight": ((128,), "bfloat16"),
        f"{kda}.o_proj.weight": ((2304, 4096), "bfloat16"),
        f"{mla}.q_proj.weight": ((6144, 2304), "bfloat16"),
        f"{mla}.kv_b_proj.weight": ((8192, 512), "bfloat16"),
        "model.layers.0.mlp.down_proj.weight": ((2304, 9216), "bfloat16"),
        f"{moe}.gate.e_score_correction_bias": ((256,), "bfloat16"),
        f"{moe}.experts.255.w1.weight": ((1024, 2304), "bfloat16"),
        f"{moe}.experts.255.w2.weight": ((2304, 1024), "bfloat16"),
        f"{moe}.shared_experts.up_proj.weight": ((1024, 2304), "bfloat16"),
    }
    assert {name: tensors[name][:2] for name in expected} == expected


@pytest.mark.parametrize("like", FAMILIES)
def test_write_toy_leaves_a_published_folder(like, tmp_path):
    config = toy_config(like, hidden_size=64)
    folder = write_toy(tmp_path / "toy", config, seed=5, shards=4)

    assert json.loads((folder / "config.json").read_text()) == config
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-000004.safetensors" for i in range(1, 5)]
    held = {file: load_file(folder / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [sum(array.nbytes for array in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) < 2 * min(sizes)

    expected = dict(published_tensors(config, 5))
    read = {name: array for tensors in held.values() for name, array in tensors.items()}
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name].view(np.uint8), array.view(np.uint8), err_msg=name)

    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 514
    assert (folder / "preprocessor_config.json").exists() == (like == "k2.5")
    assert (folder / "tiktoken.model").exists()


def test_experts_are_int4_only_where_the_config_says_so():
    def kinds(config):
        pattern = re.compile(r"experts\.\d+\.\w+\.(.*)")
        return {
            (match[1], array.dtype.name)
            for name, array in published_tensors(config)
            if (match := pattern.search(name)) and "shared" not in name
        }

    int4 = {("weight_packed", "int32"), ("weight_scale", "bfloat16"), ("weight_shape", "int32")}
    assert kinds(toy_config("k2.5")) == int4
    assert kinds(toy_config("k2.5", quantization_config=None)) == {("weight", "bfloat16")}
    assert kinds(toy_config("k2")) == {("weight", "bfloat16")}
    thinking = toy_config("k2", quantization_config=toy_config("k2.5")["text_config"]["quantization_config"])
    assert kinds(thinking) == int4


def test_a_tensor_depends_on_its_name_and_the_seed_only():
    whole, short = toy_config("kimi-linear"), toy_config("kimi-linear", num_hidden_layers=2)
    first, fewer, other = (dict(published_tensors(c, s)) for c, s in ((whole, 1), (short, 1), (whole, 2)))
    assert fewer.keys() < first.keys()
    for name, array in fewer.items():
        np.testing.assert_array_equal(array, first[name])
        assert not np.array_equal(array, other[name])
    assert not np.array_equal(
        first["model.layers.0.self_attn.f_a_proj.weight"], first["model.layers.0.self_attn.g_a_proj.weight"]
    )


def test_weights_are_drawn_at_the_scales_that_the_docstring_promises():
    tensors = {n: a.astype(np.float64) for n, a in published_tensors(toy_config("kimi-linear"))}
    layer = "model.layers.0"
    assert tensors[f"{layer}.self_attn.q_proj.weight"].std() == pytest.approx(256**-0.5, rel=0.02)
    assert tensors[f"{layer}.mlp.down_proj.weight"].std() == pytest.approx(512**-0.5, rel=0.02)
    assert tensors[f"{layer}.input_layernorm.weight"].mean() == pytest.approx(1, abs=0.03)
    latent, key = np.split(tensors["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"], [64])
    assert latent.std() == pytest.approx(0.1 / 16, rel=0.05) and key.std() == pytest.approx(1 / 16, rel=0.05)
    assert tensors["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"].std() > 0.03
    # Initialisation of arXiv 2510.26692: A in [1, 16], softplus(dt_bias) in [0.001, 0.1].
    A, dt = np.exp(tensors[f"{layer}.self_attn.A_log"]), np.log1p(np.exp(tensors[f"{layer}.self_attn.dt_bias"]))
    assert 1 <= A.min() < 6 and 10 < A.max() <= 16 and A.size == 8
    assert 0.000999 < dt.min() < 0.002 and 0.05 < dt.max() < 0.1001


def test_overrides_reach_every_home_of_a_field_and_what_must_agree_follows():
    config = toy_config("k2.5", hidden_size=64, vt_hidden_size=48, tie_word_embeddings=True)
    assert config["text_config"]["hidden_size"] == config["vision_config"]["text_hidden_size"] == 64
    assert config["vision_config"]["mm_hidden_size"] == 48
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    assert toy_config("k2.5")["text_config"]["hidden_size"] == 256  # the template is untouched


def test_bad_requests_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"like='k3'.*kimi-linear"):
        toy_config("k3")
    with pytest.raises(KeyError, match="a k2 config has no field 'num_experts'"):
        toy_config("k2", num_experts=4)
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        next(published_tensors({"model_type": "llama"}))
    with pytest.raises(ValueError, match="shards=0"):
        write_toy(tmp_path / "new", toy_config("k2"), shards=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full: is not empty"):
        write_toy(tmp_path / "full", toy_config("k2"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
