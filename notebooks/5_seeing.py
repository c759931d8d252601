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
# # Seeing
#
# A picture is cut into patches, a vision tower turns patches into features while each looks at the others, and a
# projector makes one token of the language model of every 2 x 2 patches.

# %%
MODEL = "k25-digits"

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import kimi_jax
from kimi_jax.looking import look

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)
patch = model.config.vision.patch_size

# %% [markdown]
# ## Patches
#
# Several pictures in one prompt: the tower sees each alone.

# %%
numbers = ["427", "316", "58", "12", "7"]
files = [kimi_jax.small.picture(number) for number in numbers]
prompt = processor("What number is in the picture?", images=files)
found = look(model, prompt.tokens, prompt.media, what=["vision"])
grids = [tuple(map(int, grid)) for grid in prompt.media.grids]  # (1, rows, columns) of each picture
counts = [rows * columns for _, rows, columns in grids]
ends = np.cumsum([0, *counts])
figure, axes = plt.subplots(1, len(files), figsize=(12, 2), layout="constrained", width_ratios=[g[2] for g in grids])
for axis, file, (_, rows, columns) in zip(axes, files, grids, strict=True):
    axis.imshow(Image.open(file).convert("L"), cmap="gray", extent=(0, columns, rows, 0))
    axis.set_xticks(range(columns + 1), [])
    axis.set_yticks(range(rows + 1), [])
    axis.grid(color="tab:red", linewidth=0.8)
    axis.set_title(f"{rows} x {columns} patches\n{rows * columns // 4} tokens")
plt.show()
assert found.media_tokens.shape[0] == sum(counts) // 4
assert (prompt.tokens == model.config.media_placeholder_token_id).sum() == sum(counts) // 4

# %% [markdown]
# ## Attention
#
# How much one patch, marked in red, attends to the others of its picture in the last layer, for each head.

# %%
layer = max(found.vision)
attention = np.asarray(found.vision[layer].attention, np.float64)  # [heads, patches, patches]
_, rows, columns = grids[0]
own = slice(0, counts[0])
asked = columns + 1  # the second row's second patch
figure, axes = plt.subplots(1, len(attention), figsize=(4 * len(attention), 2), layout="constrained")
for head, axis in enumerate(np.atleast_1d(axes)):
    axis.imshow(Image.open(files[0]).convert("L"), cmap="gray", extent=(0, columns, rows, 0))
    weights = attention[head, asked, own].reshape(rows, columns)
    axis.imshow(weights, cmap="inferno", alpha=0.6, extent=(0, columns, rows, 0), interpolation="nearest")
    axis.add_patch(plt.Rectangle((1, 1), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axis.set_title(f"head {head}")
    axis.axis("off")
plt.show()

# %%
np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-4)
for start, stop in itertools.pairwise(ends):  # nobody looks into another picture
    assert attention[:, start:stop, :start].max(initial=0) == attention[:, start:stop, stop:].max(initial=0) == 0

# %% [markdown]
# ## Features
#
# The three directions in which the features of all pictures' patches differ most, as red, green and blue over the
# pictures.

# %%
features = np.asarray(found.vision[layer].hidden, np.float64)
centred = features - features.mean(0)
_, sizes, directions = np.linalg.svd(centred, full_matrices=False)
parts = centred @ directions[:3].T
low, high = np.percentile(parts, [2, 98], axis=0)
colours = np.clip((parts - low) / (high - low), 0, 1)
figure, axes = plt.subplots(2, len(files), figsize=(12, 3), layout="constrained", width_ratios=[g[2] for g in grids])
for i, (file, (_, rows, columns)) in enumerate(zip(files, grids, strict=True)):
    axes[0, i].imshow(Image.open(file).convert("L"), cmap="gray")
    axes[1, i].imshow(colours[ends[i] : ends[i + 1]].reshape(rows, columns, 3))
    axes[0, i].axis("off")
    axes[1, i].axis("off")
explained = sizes[:3] ** 2 / (sizes**2).sum()
figure.suptitle(f"three directions of {features.shape[1]}: {explained.sum():.0%} of the variance")
plt.show()

# %% [markdown]
# The features know where there is ink: the three directions alone foretell how dark a patch is.

# %%
pixels = np.asarray(prompt.media.patches, np.float64)
dark = -pixels.reshape(len(pixels), -1).mean(1)
inputs = np.column_stack([parts, np.ones(len(parts))])
foretold = inputs @ np.linalg.lstsq(inputs, dark, rcond=None)[0]
explains = 1 - ((dark - foretold) ** 2).sum() / ((dark - dark.mean()) ** 2).sum()
print(f"{explains:.0%} of the variance of darkness")
assert explains > 0.3 and explained.sum() > 0.3
