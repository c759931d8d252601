"""Makes the goldens: transformers' outputs on the toy checkpoints of cases.py.

    pip install -e .[oracle]
    python tests/golden/make.py [case ...]

The reference is transformers' native code (deepseek_v3, kimi_k25, kimi_linear) with eager attention and experts, in
float32, on the dequantised weights under their official names. Each case is run again with everything in float64;
`error_X` is the largest difference between the two for X, which is the error of the reference itself.

Every case stores (T padded with the pad id, P positions, V the whole vocabulary):
    text_tokens [8, T] int32, text_lengths [8], text_positions [8, P], text_logits [8, P, V]; each row run alone
    greedy_prompts [4, T] int32, greedy_lengths [4], greedy_tokens [4, 24], greedy_margins [4, 24] (top 1 - top 2)
    sha256 of the checkpoint, transformers (its version)
kimi-linear: long_tokens [200], long_positions [P], long_logits [P, V], long_argmax [200], long_margins [200]
k2.5: image_features [tokens, hidden] of IMAGE_GRIDS and video_features of VIDEO_GRIDS, item after item;
    prompt_tokens [T] (placeholders expanded), prompt_positions [P], prompt_logits [P, V],
    prompt_greedy_tokens [24], prompt_greedy_margins [24]: text with the two PROMPT_IMAGES
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import CASES, HERE, IMAGE_GRIDS, MARGIN, NEW_TOKENS, PROMPT_IMAGES, VIDEO_GRIDS, config, fingerprint, media
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import save_file
from transformers import modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.kimi_linear import modeling_kimi_linear

from checkpoints.published.numerics import dequantize_int4
from checkpoints.toy import published_tensors

Logits = Callable[..., np.ndarray]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# of float32 rounding through a few layers; a router that chose other experts would show a far larger difference
REFERENCE_ERROR = 3e-5


class _Float64Torch:
    """Wraps torch so that `float32` is float64, since the models upcast norms, router and state to it."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Makes transformers' own upcasts go to `dtype` while in this context."""
    modules = (modeling_rope_utils, modeling_deepseek_v3, modeling_kimi_k25, modeling_kimi_linear)
    single = torch.Tensor.float
    if dtype == torch.float64:
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
        for module in modules:
            module.torch = _Float64Torch()
    try:
        yield
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def dequantized(name: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a case as plain weights under official names; the library checks our unpacking."""
    published = dict(published_tensors(config(name), CASES[name].seed))
    tensors = {}
    for key, array in published.items():
        if key.endswith((".weight_scale", ".weight_shape")):
            continue
        if key.endswith(".weight_packed"):
            stem = key.removesuffix("_packed")
            scale, shape = published[f"{stem}_scale"], published[f"{stem}_shape"]
            weight = to_torch(dequantize_int4(array, scale))
            codes = unpack_from_int32(torch.from_numpy(array), 4, torch.Size(shape.tolist())).float()
            theirs = codes.unflatten(1, (-1, 32)) * to_torch(scale).float()[..., None]
            assert torch.equal(theirs.flatten(1).bfloat16(), weight), stem
            tensors[stem] = weight
        else:
            tensors[key] = to_torch(array)
    return tensors


def native_config(name: str) -> dict[str, Any]:
    """Returns the case's config.json in the field names of transformers' own classes."""
    c = config(name)
    text = c.get("text_config", c)
    text.pop("quantization_config", None)
    if text["architectures"] == ["DeepseekV3ForCausalLM"]:  # transformers has no kimi_k2
        text["model_type"] = "deepseek_v3"
    if name == "k2.5":
        v = c["vision_config"]
        renamed = {"hidden_size": "vt_hidden_size", "intermediate_size": "vt_intermediate_size"}
        renamed |= {"num_attention_heads": "vt_num_attention_heads", "num_hidden_layers": "vt_num_hidden_layers"}
        renamed |= {f"pos_emb_{axis}": f"init_pos_emb_{axis}" for axis in ("height", "width", "time")}
        v.update({new: v[old] for new, old in renamed.items()})
        c.update(image_token_id=c["media_placeholder_token_id"], projection_hidden_size=v["mm_hidden_size"])
        c.update(projection_layer_norm_eps=v["projector_ln_eps"], video_token_id=text["vocab_size"] - 2)
    return c


def load(name: str, dtype: torch.dtype, **fields: Any) -> torch.nn.Module:
    """Loads the case's model in transformers, with `fields` replaced at the top of its config.json."""
    kinds = {"k2.5": "Kimi_K25ForConditionalGeneration", "kimi-linear": "KimiLinearForCausalLM"}
    model_class = getattr(transformers, kinds.get(name, "DeepseekV3ForCausalLM"))
    with tempfile.TemporaryDirectory() as folder, precision(dtype):
        save_file(dequantized(name), f"{folder}/model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(native_config(name) | fields))
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    return model.to(dtype).eval()


def runner(model: torch.nn.Module, dtype: torch.dtype) -> Logits:
    """Returns a function from tokens [T] to logits, float64 [T, V]."""

    def logits(tokens: np.ndarray, **media_inputs: torch.Tensor) -> np.ndarray:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad(), precision(dtype):
            return model(input_ids=ids, use_cache=False, **media_inputs).logits[0].double().numpy()

    return logits


def spread(length: int, count: int) -> np.ndarray:
    """Returns `count` positions over a prompt, its first and last among them."""
    return np.linspace(0, length - 1, count).round().astype(np.int32)


def margins(logits: np.ndarray) -> np.ndarray:
    top = np.sort(logits, axis=-1)
    return top[..., -1] - top[..., -2]


def padded(rows: list[np.ndarray], pad: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), pad, np.int32)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out


def greedy(
    logits: Logits, prompt: np.ndarray, *, placeholder: int = -1, **media_inputs: torch.Tensor
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns 24 tokens and their margins, each from a whole forward pass without a cache.

    Returns None where a step is decided by no more than MARGIN, or chooses the placeholder (the reference, given it
    once more, would ask for its image).
    """
    tokens, gaps = prompt, []
    for _ in range(NEW_TOKENS):
        last = logits(tokens, **media_inputs)[-1]
        tokens = np.append(tokens, last.argmax())
        gaps.append(margins(last))
        if gaps[-1] <= MARGIN or tokens[-1] == placeholder:
            return None
    return tokens[len(prompt) :].astype(np.int32), np.array(gaps)


class Maker:
    """Runs one case in both precisions, and gathers the arrays to store in `out`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = config(name)
        self.random = np.random.RandomState(CASES[name].seed)
        self.single, self.double = load(name, torch.float32), load(name, torch.float64)
        self.logits32, self.logits64 = runner(self.single, torch.float32), runner(self.double, torch.float64)
        self.out: dict[str, np.ndarray] = {
            "sha256": np.array(fingerprint(name)),
            "transformers": np.array(transformers.__version__),
        }

    def keep(self, key: str, single: np.ndarray, double: np.ndarray) -> None:
        error = float(np.abs(single - double).max())
        print(f"  {key} {single.shape}: rms {np.sqrt((double**2).mean()):.2f}, float32 error {error:.1e}")
        assert error < REFERENCE_ERROR, key
        self.out[key] = single.astype(np.float32)
        self.out[f"error_{key}"] = np.array(error)

    def prompt(self, length: int) -> np.ndarray:
        """Draws ordinary tokens; the last 256 of the vocabulary are special."""
        vocab = self.config.get("text_config", self.config)["vocab_size"]
        return self.random.randint(0, vocab - 256, length).astype(np.int32)

    def text(self) -> None:
        rows = [self.prompt(length) for length in (40, 3, 17, 33, 8, 25, 1, 12)]
        where = np.stack([spread(len(row), 6) for row in rows])
        single, double = (
            np.stack([logits(row)[at] for row, at in zip(rows, where, strict=True)])
            for logits in (self.logits32, self.logits64)
        )
        self.out["text_tokens"] = padded(rows, self.config["pad_token_id"])
        self.out["text_lengths"] = np.array([len(row) for row in rows], np.int32)
        self.out["text_positions"] = where
        self.keep("text_logits", single, double)

    def long(self) -> None:
        tokens = self.prompt(200)
        single, double = self.logits32(tokens), self.logits64(tokens)
        # Positions around the chunk boundaries (16 and 64) that implementations use, and at both ends.
        at = np.array([0, 1, 2, 3, 4, 14, 15, 16, 17, 31, 32, 62, 63, 64, 65, 100, 127, 128, 129, 191, 192, 199])
        self.out |= {"long_tokens": tokens, "long_positions": at.astype(np.int32)}
        self.keep("long_logits", single[at], double[at])
        assert (single.argmax(-1) == double.argmax(-1))[margins(double) > MARGIN].all()
        self.out |= {"long_argmax": double.argmax(-1).astype(np.int32), "long_margins": margins(double)}

    def continuation(self) -> None:
        """Draws prompts until every greedy step of a continuation is decided by more than MARGIN, and stores both."""
        prompts, tokens, gaps = [], [], []
        for length in (9, 21, 5, 14):
            result = None
            while result is None:
                prompt = self.prompt(length)
                result = greedy(self.logits64, prompt)
            new, gap = result
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            mask = torch.ones_like(ids)
            cached = self.single.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
                                          eos_token_id=None)  # fmt: skip
            assert (cached[0, length:].numpy() == new).all(), "cached float32 decoding went elsewhere"
            prompts, tokens, gaps = [*prompts, prompt], [*tokens, new], [*gaps, gap]
        self.out["greedy_prompts"] = padded(prompts, self.config["pad_token_id"])
        self.out["greedy_lengths"] = np.array([len(prompt) for prompt in prompts], np.int32)
        self.out["greedy_tokens"], self.out["greedy_margins"] = np.stack(tokens), np.stack(gaps)

    def features(self, key: str, grids: np.ndarray) -> None:
        """Runs one item at a time, since transformers' tower refuses items of different t in one call."""
        results = []
        for model, dtype in ((self.single, torch.float32), (self.double, torch.float64)):
            rows = []
            for grid in grids:
                patches = torch.from_numpy(media(grid)).to(dtype)
                with torch.no_grad(), precision(dtype):
                    merged = model.model.vision_tower(patches, grid_thw=torch.from_numpy(grid[None].astype(np.int64)))
                    rows.append(model.model.mm_projector(merged.pooler_output).squeeze(1).double().numpy())
            results.append(np.concatenate(rows))
        self.keep(key, *results)

    def image_prompt(self) -> None:
        grids = IMAGE_GRIDS[list(PROMPT_IMAGES)]
        pad = self.config["media_placeholder_token_id"]
        images = [np.full(h * w // 4, pad, np.int32) for _, h, w in grids]
        patches = torch.from_numpy(np.concatenate([media(grid) for grid in grids]))
        inputs = {"pixel_values": patches, "image_grid_thw": torch.from_numpy(grids.astype(np.int64))}
        inputs64 = inputs | {"pixel_values": patches.double()}
        result = None
        while result is None:
            tokens = np.concatenate([self.prompt(6), images[0], self.prompt(5), images[1], self.prompt(7)])
            result = greedy(self.logits64, tokens, placeholder=pad, **inputs64)
        new, gap = result
        single = np.concatenate([tokens, new[:-1]])
        assert (self.logits32(single, **inputs)[len(tokens) - 1 :].argmax(-1) == new).all()
        at = spread(len(tokens), 14)
        self.out |= {"prompt_tokens": tokens, "prompt_positions": at}
        self.keep("prompt_logits", self.logits32(tokens, **inputs)[at], self.logits64(tokens, **inputs64)[at])
        self.out |= {"prompt_greedy_tokens": new, "prompt_greedy_margins": gap}

    def run(self) -> None:
        self.text()
        self.continuation()
        if self.name == "kimi-linear":
            self.long()
        if self.name == "k2.5":
            self.features("image_features", IMAGE_GRIDS)
            self.features("video_features", VIDEO_GRIDS)
            self.image_prompt()
        path = HERE / f"{self.name}.npz"
        np.savez_compressed(path, **self.out)
        print(f"  {path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    for name in sys.argv[1:] or CASES:
        print(name)
        Maker(name).run()
