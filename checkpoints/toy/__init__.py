"""Random checkpoints in the published layout: small ones for tests, goldens and the demo, and large ones.

Tensor names, shapes and dtypes are those of the released safetensors (Kimi-K2.5 and K2-Thinking with INT4 experts,
Kimi-K2 in FP8 or bf16, Kimi-Linear-48B), so whatever reads a toy reads the real thing. Every tensor comes from its own
generator, seeded by (seed, crc32(name)): a toy is the same on every machine, and in whatever order it is made.
Weights have a standard deviation of about 1/sqrt(fan_in), which keeps activations and logits at unit scale; what a
norm follows at once is smaller (embeddings, low-rank latents), so that the norm's epsilon shows in the logits.
"""

from checkpoints.toy.configs import cut_config, toy_config
from checkpoints.toy.heads import HEADS, head_config
from checkpoints.toy.weights import published_tensors, weights
from checkpoints.toy.write import make_toy, write_toy

__all__ = ["HEADS", "cut_config", "head_config", "make_toy", "published_tensors", "toy_config", "weights", "write_toy"]
