"""Eagle3 draft heads in numpy, token by token and head by head, from the formulas of arXiv 2503.01840, 2405.04434 and
2309.00071.

It knows nothing of this package's model code: tensors are asked for under their published names, and a token's past is
recomputed from the start. Eagle 3.1's norms are as vLLM and SGLang have them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def softmax(scores: Array) -> Array:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def frequencies(config: Mapping[str, Any], width: int) -> Array:
    """Returns the radians per position of each pair of `width` channels, with YaRN's ramp between two of them."""
    theta, yarn = config["rope_theta"], config["rope_scaling"]
    out = np.empty(width // 2)
    for i in range(width // 2):
        plain = theta ** (-2 * i / width)
        ends = [
            width * math.log(yarn["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (yarn["beta_fast"], yarn["beta_slow"])
        ]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
        share = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        out[i] = plain / yarn["factor"] * share + plain * (1 - share)
    return out


class EagleReference:
    """The head of a config.json and its published tensors. `embeddings` [words, d] are its target's."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Array], embeddings: Array):
        self.config, self.tensors = config, tensors
        self.latent = "kv_lora_rank" in config
        self.layer = "layers.0" if self.latent else "midlayer"
        own = tensors.get("embed_tokens.weight", embeddings)
        self.embeddings = own.astype(np.float64)

    def weight(self, name: str) -> Array:
        return self.tensors[f"{name}.weight"].astype(np.float64)

    def norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weight(name), self.config["rms_norm_eps"])

    def combine(self, aux: Array) -> Array:
        """Returns the hidden vectors [t, d] of the target's outputs [t, 3 * d]."""
        parts = np.split(aux.astype(np.float64), 3, axis=-1)
        if self.config.get("fc_norm"):
            parts = [self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
        return np.concatenate(parts, axis=-1) @ self.weight("fc").T

    def run(self, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        """Returns the logits [t, words] and the vectors for the next draft [t, d], given hidden vectors [t, d] and the
        tokens after them, at positions 0 to t - 1."""
        layer = self.layer
        both = [
            self.norm(self.embeddings[tokens], f"{layer}.input_layernorm"),
            self.norm(hidden, f"{layer}.hidden_norm"),
        ]
        a = (self.latent_attention if self.latent else self.attention)(np.concatenate(both, axis=-1))
        r = hidden + a
        y = self.norm(r, f"{layer}.post_attention_layernorm")
        gate, up = y @ self.weight(f"{layer}.mlp.gate_proj").T, y @ self.weight(f"{layer}.mlp.up_proj").T
        x = r + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"{layer}.mlp.down_proj").T
        normed = self.norm(x, "norm")
        return normed @ self.weight("lm_head").T, normed if self.config.get("norm_output") else x

    def draft(self, aux: Array, tokens: Array, count: int) -> tuple[list[int], float]:
        """Returns the tokens drafted after a prompt, and the least difference between a word and the second best."""
        hidden, tokens, margin = self.combine(aux), list(tokens), math.inf
        for _ in range(count):
            logits, vectors = self.run(hidden, np.array(tokens))
            best = np.sort(logits[-1])[-2:]
            margin = min(margin, float(best[1] - best[0]))
            word = int(logits[-1].argmax())
            tokens.append(word + int(self.tensors["d2t"][word]) if "d2t" in self.tensors else word)
            hidden = np.concatenate([hidden, vectors[-1:]])
        return tokens[-count:], margin

    def rotated(self, x: Array, halves: bool) -> Array:
        """Rotates x [t, heads, width]: channels 2i and 2i + 1, or with `halves` i and i + width / 2."""
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies(self.config, x.shape[-1]))
        half = x.shape[-1] // 2
        pairs = (x[..., :half] + 1j * x[..., half:] if halves else x[..., ::2] + 1j * x[..., 1::2]) * turn
        if halves:
            return np.concatenate([pairs.real, pairs.imag], axis=-1)
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    def attend(self, q: Array, k: Array, v: Array, scale: float) -> Array:
        """Returns the causal attention of each head of q [t, heads, width], side by side."""
        out = np.empty((len(q), q.shape[1], v.shape[-1]))
        for t in range(len(q)):
            for h in range(q.shape[1]):
                out[t, h] = softmax(k[: t + 1, h] @ q[t, h] * scale) @ v[: t + 1, h]
        return out.reshape(len(q), -1)

    def latent_attention(self, x: Array) -> Array:
        config, name = self.config, f"{self.layer}.self_attn"
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        q_a = self.norm(x @ self.weight(f"{name}.q_a_proj").T, f"{name}.q_a_layernorm")
        q = (q_a @ self.weight(f"{name}.q_b_proj").T).reshape(len(x), heads, -1)
        c, k_pe = np.split(x @ self.weight(f"{name}.kv_a_proj_with_mqa").T, [config["kv_lora_rank"]], axis=1)
        kv = (self.norm(c, f"{name}.kv_a_layernorm") @ self.weight(f"{name}.kv_b_proj").T).reshape(len(x), heads, -1)
        q_pe, k_pe = self.rotated(q[..., nope:], False), self.rotated(k_pe[:, None], False)
        k = np.concatenate([kv[..., :nope], np.repeat(k_pe, heads, axis=1)], axis=-1)
        m = 0.1 * config["rope_scaling"]["mscale_all_dim"] * math.log(config["rope_scaling"]["factor"]) + 1
        q = np.concatenate([q[..., :nope], q_pe], axis=-1)
        return self.attend(q, k, kv[..., nope:], q.shape[-1] ** -0.5 * m * m) @ self.weight(f"{name}.o_proj").T

    def attention(self, x: Array) -> Array:
        config, name = self.config, f"{self.layer}.self_attn"
        width, group = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
        q, k, v = ((x @ self.weight(f"{name}.{part}_proj").T).reshape(len(x), -1, width) for part in "qkv")
        k, v = np.repeat(self.rotated(k, True), group, axis=1), np.repeat(v, group, axis=1)
        return self.attend(self.rotated(q, True), k, v, width**-0.5) @ self.weight(f"{name}.o_proj").T
