# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # INT4
#
# Published Kimis hold the experts as codes from -7 to 7 and a bf16 scale for each group of 32. What does that cost,
# and what does it save? Here a model that was trained in bf16 is converted both ways.

# %%
MODEL = "kimi-linear-small"

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import checkpoints
import kimi_jax
from pallas_kernels import dequantize_int4, quantize_int4

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
temporary = tempfile.TemporaryDirectory()
models, bytes_of_experts = {}, {}
for form in ("bf16", "int4"):
    target = Path(temporary.name) / form
    checkpoints.convert(folder, target, experts=form)
    summary = checkpoints.summary(target)
    bytes_of_experts[form] = next(part.nbytes for part in summary.parts if part.name == "routed experts")
    models[form] = kimi_jax.load(target)
processor = kimi_jax.Processor.from_folder(folder)

# %% [markdown]
# ## Codes
#
# One expert's matrix: its numbers, the codes that stand for them, and the error of each group.

# %%
layer = next(i for i, block in enumerate(models["bf16"].model.layers) if hasattr(block.mlp, "experts"))
experts = models["bf16"].model.layers[layer].mlp.experts
dense = np.asarray(experts.up_proj.read().dequantize(), np.float32)[0]  # of the first expert, [out, in]
codes, scales = quantize_int4(dense.T)  # int4 [in, out], a scale for 32 inputs
back = np.asarray(dequantize_int4(codes, scales), np.float32).T
groups = (dense - back).reshape(len(dense), -1, 32)
error = np.sqrt((groups**2).mean(-1)) / np.sqrt((dense.reshape(groups.shape) ** 2).mean(-1))

figure, axes = plt.subplots(1, 3, figsize=(13, 3), layout="constrained")
axes[0].hist(dense.ravel(), bins=80, color="tab:gray")
axes[0].set_title("weights")
axes[1].bar(*np.unique(np.asarray(codes, np.int32), return_counts=True), color="tab:blue")
axes[1].set_title("codes")
axes[2].hist(error.ravel(), bins=40, color="tab:orange")
axes[2].set_title("error of a group, relative")
plt.show()

# %%
used = np.unique(np.asarray(codes, np.int32))
assert used.min() >= -8 and used.max() <= 7
step = np.repeat(np.asarray(scales, np.float32), 32, axis=0).T
assert (np.abs(dense - back) <= 0.51 * step + 0.01 * np.abs(dense)).all()  # half a step, and bf16's own rounding
assert 0.03 < np.median(error) < 0.2

# %% [markdown]
# ## Bytes

# %%
saved = bytes_of_experts["bf16"] / bytes_of_experts["int4"]
print(
    f"experts: {bytes_of_experts['bf16']:,} bytes in bf16, {bytes_of_experts['int4']:,} in INT4: {saved:.2f} times less"
)
assert abs(saved - 16 / 4.5) < 0.01  # 4 bits, and 16 for each 32

# %% [markdown]
# ## What the model says of it
#
# Both forms read the same text. Kullback-Leibler divergence of the next word, and how often the best guess is the
# same.

# %%
questions = [
    "Copy: red dog 4 old house 7 gold ring tiny boat",
    "What is 327 + 486?",
    "Remember: red dog 41, blue cat 73, old house 18, tiny boat 96.\nWhich number has the blue cat?",
]
answers = [
    "red dog 4 old house 7 gold ring tiny boat",
    "7 + 6 + 0 = 13. 2 + 8 + 1 = 11. 3 + 4 + 1 = 8. So 813.",
    "blue cat 73",
]
texts = []
for question, answer in zip(questions, answers, strict=True):
    begin = processor(question, thinking=False).tokens[0]
    texts.append((len(begin), [*begin, *processor.tokenizer.encode(answer)]))
longest = max(len(ids) for _, ids in texts)
rows = np.stack([np.pad(ids, (0, longest - len(ids))) for _, ids in texts])
chances = {form: np.asarray(jax.nn.log_softmax(model(rows), -1), np.float64) for form, model in models.items()}
spoken = [(row, at) for row, (begin, ids) in enumerate(texts) for at in range(begin - 1, len(ids) - 1)]
bf16, int4 = (np.stack([chances[form][place] for place in spoken]) for form in ("bf16", "int4"))
divergence = (np.exp(bf16) * (bf16 - int4)).sum(-1)
same = bf16.argmax(-1) == int4.argmax(-1)

figure, axis = plt.subplots(figsize=(12, 3), layout="constrained")
axis.bar(range(len(spoken)), divergence, color=np.where(same, "tab:blue", "tab:red"))
axis.set_yscale("log")
axis.set_xticks(
    range(len(spoken)),
    [processor.tokenizer.decode([texts[row][1][at + 1]]) for row, at in spoken],
    rotation=90,
    fontsize=7,
)
axis.set_ylabel("KL, nats")
axis.set_title(f"mean {divergence.mean():.4f}; the best guess is the same for {same.mean():.0%} (red: another)")
plt.show()

# %%
assert divergence.mean() < 0.1 and same.mean() > 0.9
temporary.cleanup()
