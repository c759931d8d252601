"""Kimi K3 in numpy, token by token and expert by expert, from the formulas of its report (arXiv 2607.24653).

It knows nothing of this package's model code: tensors are asked for under their published names, and a token's
past is recomputed from the start. MXFP4 experts are decoded here too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
INNER_EPS = 1e-6  # of MLA's two inner norms, in the reference code
TOWER_EPS = 1.1920929e-7  # of torch's RMSNorm without eps
LANGUAGE = "language_model."
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def situ(gate: Array, up: Array, beta: float, linear_beta: float) -> Array:
    return beta * np.tanh(gate / beta) * sigmoid(gate) * linear_beta * np.tanh(up / linear_beta)


def softmax(scores: Array) -> Array:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def decode_mxfp4(packed: Array, scale: Array) -> Array:
    """Decodes uint8 [out, in / 2], two e2m1 codes a byte with the even column's in the low nibble, and the exponents
    uint8 [out, in / 32] of groups of 32 columns."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values = np.where(codes & 8, -1.0, 1.0) * _E2M1[codes & 7]
    return values * np.repeat(2.0 ** (scale.astype(np.int64) - 127), 32, axis=1)


@dataclass
class Trace:
    """Holds what a run of a prompt showed: `prefix` after each layer and `snapshots` [t, d]; each layer's `experts`
    [t, j], and the least difference `margin` between a chosen expert's score and one that was not; KDA states
    [h, k, v]."""

    prefix: list[Array] = field(default_factory=list)
    snapshots: list[Array] = field(default_factory=list)
    experts: dict[int, Array] = field(default_factory=dict)
    margin: float = math.inf
    states: dict[int, Array] = field(default_factory=dict)


class Reference:
    """The model of a config.json and its published tensors."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Array]):
        self.config, self.text, self.vision = config, config["text_config"], config["vision_config"]
        self.tensors = tensors

    def weight(self, name: str) -> Array:
        """Returns `name`.weight in float64."""
        if f"{name}.weight_packed" in self.tensors:
            return decode_mxfp4(self.tensors[f"{name}.weight_packed"], self.tensors[f"{name}.weight_scale"])
        return self.tensors[f"{name}.weight"].astype(np.float64)

    # --- the language model ---------------------------------------------------------------------------------------

    def logits(self, tokens: Array, media: Array | None = None) -> tuple[Array, Trace]:
        """Returns the logits [t, words] of one prompt, and its trace. `media` [m, d] takes the placeholders' places."""
        text, trace = self.text, Trace()
        prefix = self.weight(f"{LANGUAGE}model.embed_tokens")[tokens]
        if media is not None:
            prefix[tokens == self.config["media_placeholder_token_id"]] = media
        snapshots: list[Array] = []
        for number in range(text["num_hidden_layers"]):
            layer = f"{LANGUAGE}model.layers.{number}"
            h = self.attend_depth(prefix, snapshots, f"{layer}.self_attention_res") if snapshots else prefix
            begins = number % text["attn_res_block_size"] == 0
            if begins:
                snapshots.append(prefix)
            x = rms_norm(h, self.weight(f"{layer}.input_layernorm"), text["rms_norm_eps"])
            kda = number + 1 in text["linear_attn_config"]["kda_layers"]
            mixed = self.kda(x, layer, number, trace) if kda else self.mla(x, f"{layer}.self_attn")
            prefix = mixed if begins else prefix + mixed
            h = self.attend_depth(prefix, snapshots, f"{layer}.mlp_res")
            x = rms_norm(h, self.weight(f"{layer}.post_attention_layernorm"), text["rms_norm_eps"])
            dense = number < text["first_k_dense_replace"]
            prefix = prefix + (self.mlp(x, f"{layer}.mlp") if dense else self.mixture(x, layer, number, trace))
            trace.prefix.append(prefix)
        trace.snapshots = snapshots
        h = self.attend_depth(prefix, snapshots, f"{LANGUAGE}model.output_attn_res")
        h = rms_norm(h, self.weight(f"{LANGUAGE}model.norm"), text["rms_norm_eps"])
        return h @ self.weight(f"{LANGUAGE}lm_head").T, trace

    def attend_depth(self, prefix: Array, snapshots: list[Array], name: str) -> Array:
        norm, proj = self.weight(f"{name}_norm"), self.weight(f"{name}_proj")[0]
        out = np.empty_like(prefix)
        for t in range(len(prefix)):
            sources = np.stack([*(snapshot[t] for snapshot in snapshots), prefix[t]])
            out[t] = softmax(rms_norm(sources, norm, self.text["rms_norm_eps"]) @ proj) @ sources
        return out

    def kda(self, x: Array, layer: str, number: int, trace: Trace) -> Array:
        linear, name = self.text["linear_attn_config"], f"{layer}.self_attn"
        heads, dim, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]

        def convolved(part: str) -> Array:
            raw = np.pad(x @ self.weight(f"{name}.{part}_proj").T, ((taps - 1, 0), (0, 0)))
            kernel = self.weight(f"{name}.{part}_conv1d")[:, 0]
            y = np.stack([sum(raw[t + j] * kernel[:, j] for j in range(taps)) for t in range(len(x))])
            return (y * sigmoid(y)).reshape(len(x), heads, dim)

        q, k, v = (convolved(part) for part in "qkv")
        q, k = (z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6) for z in (q, k))
        q = q * dim**-0.5
        f = x @ self.weight(f"{name}.f_a_proj").T @ self.weight(f"{name}.f_b_proj").T
        f = (f + self.tensors[f"{name}.dt_bias"].astype(np.float64)).reshape(len(x), heads, dim)
        rate = np.exp(self.tensors[f"{name}.A_log"].astype(np.float64)[:heads])
        g = linear["gate_lower_bound"] * sigmoid(rate[:, None] * f)
        beta = sigmoid(x @ self.weight(f"{name}.b_proj").T)
        state, out = np.zeros((heads, dim, dim)), np.empty((len(x), heads, dim))
        for t in range(len(x)):
            for h in range(heads):
                decayed = np.exp(g[t, h])[:, None] * state[h]
                state[h] = decayed + beta[t, h] * np.outer(k[t, h], v[t, h] - decayed.T @ k[t, h])
                out[t, h] = state[h].T @ q[t, h]
        trace.states[number] = state
        z = sigmoid(x @ self.weight(f"{name}.g_proj").T).reshape(out.shape)
        y = rms_norm(out, self.weight(f"{name}.o_norm"), self.text["rms_norm_eps"]) * z
        return y.reshape(len(x), -1) @ self.weight(f"{name}.o_proj").T

    def mla(self, x: Array, name: str) -> Array:
        text = self.text
        heads, nope, v_dim = text["num_attention_heads"], text["qk_nope_head_dim"], text["v_head_dim"]
        q_a = rms_norm(x @ self.weight(f"{name}.q_a_proj").T, self.weight(f"{name}.q_a_layernorm"), INNER_EPS)
        q = (q_a @ self.weight(f"{name}.q_b_proj").T).reshape(len(x), heads, -1)
        c, k_pe = np.split(x @ self.weight(f"{name}.kv_a_proj_with_mqa").T, [text["kv_lora_rank"]], axis=1)
        kv = rms_norm(c, self.weight(f"{name}.kv_a_layernorm"), INNER_EPS) @ self.weight(f"{name}.kv_b_proj").T
        kv = kv.reshape(len(x), heads, nope + v_dim)
        gate = sigmoid(x @ self.weight(f"{name}.g_proj").T).reshape(len(x), heads, v_dim)
        a = np.empty((len(x), heads, v_dim))
        for t in range(len(x)):
            for h in range(heads):
                scores = kv[: t + 1, h, :nope] @ q[t, h, :nope] + k_pe[: t + 1] @ q[t, h, nope:]
                a[t, h] = softmax(scores * q.shape[-1] ** -0.5) @ kv[: t + 1, h, nope:]
        return (a * gate).reshape(len(x), -1) @ self.weight(f"{name}.o_proj").T

    def glu(self, x: Array, gate: str, up: str, down: str) -> Array:
        betas = self.text["activation_situ_beta"], self.text["activation_situ_linear_beta"]
        return situ(x @ self.weight(gate).T, x @ self.weight(up).T, *betas) @ self.weight(down).T

    def mlp(self, x: Array, name: str) -> Array:
        return self.glu(x, *(f"{name}.{part}_proj" for part in ("gate", "up", "down")))

    def mixture(self, x: Array, layer: str, number: int, trace: Trace) -> Array:
        text, name = self.text, f"{layer}.block_sparse_moe"
        scores = sigmoid(x @ self.weight(f"{name}.gate").T)
        choice = scores + self.tensors[f"{name}.gate.e_score_correction_bias"].astype(np.float64)
        latent = x @ self.weight(f"{name}.routed_expert_down_proj").T
        count = text["num_experts_per_token"]
        chosen = np.argsort(-choice, axis=1, kind="stable")[:, :count]
        ranked = -np.sort(-choice, axis=1)
        trace.experts[number] = chosen
        trace.margin = min(trace.margin, float((ranked[:, count - 1] - ranked[:, count]).min()))
        sums = np.zeros_like(latent)
        for t in range(len(x)):
            weights = scores[t, chosen[t]]
            weights = weights / (weights.sum() + 1e-20) * text["routed_scaling_factor"]
            for expert, weight in zip(chosen[t], weights, strict=True):
                parts = (f"{name}.experts.{expert}.{part}" for part in ("w1", "w3", "w2"))
                sums[t] += weight * self.glu(latent[t : t + 1], *parts)[0]
        normed = rms_norm(sums, self.weight(f"{name}.routed_expert_norm"), text["rms_norm_eps"])
        return normed @ self.weight(f"{name}.routed_expert_up_proj").T + self.mlp(x, f"{name}.shared_experts")

    # --- the vision tower -----------------------------------------------------------------------------------------

    def encode(self, patches: Array, grid: Array) -> Array:
        """Returns the media tokens [m, d] of one item, given patches [t * h * w, 3, 14, 14] and its grid (t, h, w)."""
        vision, (frames, height, width) = self.vision, map(int, grid)
        heads, tower = vision["vt_num_attention_heads"], "vision_tower"
        rows, columns = (index.ravel() for index in np.mgrid[:height, :width])
        rows, columns = np.tile(rows, frames), np.tile(columns, frames)
        x = (
            patches.reshape(len(patches), -1)
            @ self.weight(f"{tower}.patch_embed.proj").reshape(vision["vt_hidden_size"], -1).T
        )
        x = x + np.tile(self.positions(height, width), (frames, 1))
        if frames > 1:
            pairs = np.arange(vision["vt_hidden_size"] // 2)
            phase = np.arange(frames)[:, None] * 10000.0 ** (-2 * pairs / vision["vt_hidden_size"])
            x = x + np.repeat(np.concatenate([np.sin(phase), np.cos(phase)], axis=1), height * width, axis=0)
        dim = vision["qkv_hidden_size"] // heads
        turn = np.empty((len(x), dim // 2), complex)  # pair 2i turns by the column, pair 2i + 1 by the row
        for i in range(dim // 4):
            frequency = 10000.0 ** (-4 * i / dim)
            turn[:, 2 * i], turn[:, 2 * i + 1] = np.exp(1j * columns * frequency), np.exp(1j * rows * frequency)

        def rotated(z: Array) -> Array:
            pairs = (z[..., ::2] + 1j * z[..., 1::2]) * turn[:, None]
            return np.stack([pairs.real, pairs.imag], axis=-1).reshape(z.shape)

        for number in range(vision["vt_num_hidden_layers"]):
            block = f"{tower}.encoder.blocks.{number}"
            qkv = rms_norm(x, self.weight(f"{block}.norm0"), TOWER_EPS) @ self.weight(f"{block}.wqkv").T
            q, k, v = (part.reshape(len(x), heads, dim) for part in np.split(qkv, 3, axis=1))
            q, k = rotated(q), rotated(k)
            a = [softmax(q[:, h] @ k[:, h].T * dim**-0.5) @ v[:, h] for h in range(heads)]
            x = x + np.concatenate(a, axis=1) @ self.weight(f"{block}.wo").T
            y = rms_norm(x, self.weight(f"{block}.norm1"), TOWER_EPS) @ self.weight(f"{block}.mlp.fc0").T
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + y @ self.weight(f"{block}.mlp.fc1").T
        x = rms_norm(x, self.weight(f"{tower}.encoder.final_layernorm"), TOWER_EPS)
        mean = x.reshape(frames, height, width, -1).mean(axis=0)
        kh, kw = vision["merge_kernel_size"]
        cells = [mean[i : i + kh, j : j + kw].reshape(-1) for i in range(0, height, kh) for j in range(0, width, kw)]
        y = np.stack(cells) @ self.weight("mm_projector.proj.0").T
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        y = y @ self.weight("mm_projector.proj.2").T
        return rms_norm(y, self.weight("mm_projector.post_norm"), vision["projector_ln_eps"])

    def positions(self, height: int, width: int) -> Array:
        """Returns the table of positions, resampled bilinearly to a grid: [height * width, d]."""
        table = self.weight("vision_tower.patch_embed.pos_emb")
        out = np.empty((height, width, table.shape[-1]))
        for y in range(height):
            for x in range(width):
                out[y, x] = 0
                for i, by_row in _bilinear(y, height, table.shape[0]):
                    for j, by_column in _bilinear(x, width, table.shape[1]):
                        out[y, x] += by_row * by_column * table[i, j]
        return out.reshape(height * width, -1)


def _bilinear(index: int, count: int, size: int) -> list[tuple[int, float]]:
    """Returns the two cells of a row of `size` that position `index` of `count` lies between, with their shares."""
    source = max((index + 0.5) * size / count - 0.5, 0.0)
    first = math.floor(source)
    return [(first, 1 - (source - first)), (min(first + 1, size - 1), source - first)]
