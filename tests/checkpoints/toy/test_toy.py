"""Toy checkpoints against the released ones: names, shapes, counts, bytes; drawn whole, and by rows."""

import json
import re
import tracemalloc

import numpy as np
import pytest
from checkpoint_oracle import read_all
from safetensors.numpy import load_file

from checkpoints.published.numerics import dequantize_int4, quantize_int4
from checkpoints.published.quantization_config import describe_form
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored.names import contents
from checkpoints.toy import cut_config, draw, make_toy, published_tensors, toy_config, weights, write_toy
from kimi_jax import config_json

KDA_ONLY = toy_config("kimi-linear")["linear_attn_config"] | {"kda_layers": [1, 2], "full_attn_layers": []}
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
    """Returns name -> (shape, dtype, bytes) of the released tensors; a quantised weight stands for three."""
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


# --- by rows, at real widths ------------------------------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "vt_num_hidden_layers": 1, "hidden_size": 128, "n_routed_experts": 4}


def made(folder, config, **asked):
    return read_all(make_toy(folder, config, **asked))


@pytest.mark.parametrize("form", ["int4", "fp8", "bf16"])
def test_a_toy_by_rows_has_the_tensors_of_one_drawn_whole(tmp_path, form, monkeypatch):
    config = describe_form(toy_config("k2.5", **TINY), form)
    whole = {name: (array.dtype, array.shape) for name, array in published_tensors(config)}
    monkeypatch.setattr(draw, "BLOCK_WEIGHTS", 50_000)
    tensors = made(tmp_path / "toy", config, shard_bytes=500_000)
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == whole
    assert json.loads((tmp_path / "toy" / "config.json").read_text()) == config
    assert len(list((tmp_path / "toy").glob("*.safetensors"))) > 2
    contents(config_json.from_folder(tmp_path / "toy"), Published.open(tmp_path / "toy"))


def test_a_toy_by_rows_is_drawn_at_the_same_scales(tmp_path):
    config = toy_config("k2.5", **TINY)
    tensors, whole = made(tmp_path / "toy", config), dict(published_tensors(config))
    assert not set(tensors) ^ set(whole)
    for name, array in whole.items():
        if name.endswith("_packed"):
            scale = name.replace("_packed", "_scale")
            a, b = (dequantize_int4(t[name], t[scale]).astype(np.float64) for t in (tensors, whole))
        elif array.dtype == np.int32 or name.endswith("_scale"):
            continue
        else:
            a, b = tensors[name].astype(np.float64), array.astype(np.float64)
        if a.size > 5000:
            assert a.std() == pytest.approx(b.std(), rel=0.05), name
            assert a.mean() == pytest.approx(b.mean(), abs=6 * b.std() / a.size**0.5), name
            assert np.corrcoef(a.reshape(-1)[1:], a.reshape(-1)[:-1])[0, 1] == pytest.approx(0, abs=0.05), name


def test_drawn_words_are_what_quantising_gives(tmp_path):
    tensors = made(tmp_path / "toy", toy_config("k2.5", **TINY))
    for name in [name for name in tensors if name.endswith("_packed")]:
        packed, scale = tensors[name], tensors[name.replace("_packed", "_scale")]
        again = quantize_int4(dequantize_int4(packed, scale))
        assert again[0].tobytes() == packed.tobytes() and again[1].tobytes() == scale.tobytes()
        assert len(np.unique(packed)) > packed.size * 0.99


def test_a_toy_by_rows_is_the_same_again_and_another_with_another_seed(tmp_path):
    config = toy_config("kimi-linear", num_hidden_layers=2, num_experts=2, linear_attn_config=KDA_ONLY)
    first, again, other = (made(tmp_path / f"{i}", config, seed=seed) for i, seed in enumerate((1, 1, 2)))
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes() != other[name].tobytes(), name


def test_memory_of_a_toy_by_rows_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "BLOCK_WEIGHTS", 2**14)
    config = toy_config("k2", num_hidden_layers=1, vocab_size=2**14)
    tracemalloc.start()
    make_toy(tmp_path / "toy", config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000 < sum(file.stat().st_size for file in (tmp_path / "toy").iterdir()) / 4


def test_presets_are_toys_at_their_real_widths():
    config = toy_config("kimi-k2.5")
    assert {key: config["text_config"].get(key, config["vision_config"].get(key)) for key in K25_FIELDS} == K25_FIELDS
    cut = cut_config(config, layers=2, experts=128)
    nbytes = sum(t.nbytes for t in weights(cut))
    assert nbytes == pytest.approx(10.0e9, rel=0.02)  # one dense and one MoE layer
    assert config["text_config"]["num_hidden_layers"] == 61  # the argument is untouched
    fp8 = {t.name for t in weights(cut_config(toy_config("kimi-k2"), layers=2, experts=1)) if t.form == "fp8"}
    layer = "model.layers.1"
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    right = {f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in attention}
    for part in ("model.layers.0.mlp", f"{layer}.mlp.experts.0", f"{layer}.mlp.shared_experts"):
        right |= {f"{part}.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert fp8 == right


def test_a_cut_model_is_whole():
    cut = cut_config(toy_config("kimi-linear-48b"), layers=5, experts=4)
    assert cut["linear_attn_config"]["kda_layers"] == [1, 2, 3, 5]
    assert cut["linear_attn_config"]["full_attn_layers"] == [4]
    assert (cut["num_experts"], cut["num_experts_per_token"]) == (4, 4)
    config_json.from_dict(cut)
    with pytest.raises(ValueError, match="vt_num_hidden_layers cannot be 1: expected 1 to 0"):
        cut_config(toy_config("k2"), vision_layers=1)


def test_weights_of_a_published_folder_are_copied(tmp_path):
    """Layers, experts and the router's rows; tokenizer and templates go along, config.json says what is there."""
    source = write_toy(tmp_path / "source", toy_config("k2.5", hidden_size=64, num_hidden_layers=3))
    (source / "chat_template.jinja").write_text("{{ x }}")
    config = cut_config(json.loads((source / "config.json").read_text()), layers=2, experts=3, vision_layers=1)
    copied = made(tmp_path / "copied", config, source=source)
    assert copied.keys() == {header.name for weight in weights(config) for header in weight.headers}
    whole = read_all(source)
    for name, array in copied.items():
        assert array.tobytes() == whole[name][: array.shape[0]].tobytes(), name
    assert copied["language_model.model.layers.1.mlp.gate.weight"].shape == (3, 64)
    assert json.loads((tmp_path / "copied" / "config.json").read_text()) == config
    assert (tmp_path / "copied" / "chat_template.jinja").exists() and (tmp_path / "copied" / "tiktoken.model").exists()


def test_what_cannot_be_copied_leaves_nothing(tmp_path):
    source = write_toy(tmp_path / "source", toy_config("k2", num_hidden_layers=1, hidden_size=64))
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+: expected .* or more rows, found nothing"):
        make_toy(tmp_path / "toy", config | {"num_hidden_layers": 2}, source=source)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight: expected bfloat16 \[768, 32\] .*found bfloat16 \[768, 64\]"
    ):
        make_toy(tmp_path / "toy", config | {"hidden_size": 32}, source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(FileExistsError, match="source: destination exists and is not empty"):
        make_toy(source, config)


def test_overrides_reach_every_home_of_a_field_and_what_must_agree_follows():
    config = toy_config("k2.5", hidden_size=64, vt_hidden_size=48, tie_word_embeddings=True)
    assert config["text_config"]["hidden_size"] == config["vision_config"]["text_hidden_size"] == 64
    assert config["vision_config"]["mm_hidden_size"] == 48
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    assert toy_config("k2.5")["text_config"]["hidden_size"] == 256  # the template is untouched


def test_bad_requests_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"like='k4'.*kimi-linear"):
        toy_config("k4")
    with pytest.raises(ValueError, match="a k2 config has no field 'num_experts'"):
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
