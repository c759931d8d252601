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
# # Inside the router
#
# Each token of a mixture-of-experts layer goes through a few of the layer's experts. Which ones?

# %%
MODEL = "k25-digits"

# %%
import matplotlib.pyplot as plt
import numpy as np

import kimi_jax
from kimi_jax.looking import look

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)
config = model.config.text

# %% [markdown]
# One conversation: a picture, a question, and the model's own answer after it. `look` runs the model's layers and
# returns the experts that each chose.

# %%
question = "What number is in the picture?"
prompt = processor(question, images=[kimi_jax.small.picture("427")])
said = kimi_jax.generate(model, prompt.tokens, 24, media=prompt.media)[0]
said = said[: list(said).index(processor.tokenizer.special_tokens["<|im_end|>"]) + 1]
tokens = np.concatenate([prompt.tokens, said[None]], axis=1)
found = look(model, tokens, prompt.media, what=["router"])
layers = sorted(found.router)
chosen = {layer: np.asarray(found.router[layer].chosen)[0] for layer in layers}  # [tokens, experts of a token]
weights = {layer: np.asarray(found.router[layer].weights)[0] for layer in layers}

# %%
words = [processor.tokenizer.decode([token]) for token in tokens[0]]
is_picture = tokens[0] == model.config.media_placeholder_token_id
words = ["▣" if picture else word.replace("\n", "↵") for word, picture in zip(words, is_picture, strict=True)]
figure, axes = plt.subplots(len(layers), 1, figsize=(11, 2.2 * len(layers)), layout="constrained", sharex=True)
for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
    share = np.zeros((config.n_routed_experts, len(words)))
    np.put_along_axis(share, chosen[layer].T, weights[layer].T, axis=0)
    shown = axis.imshow(share, aspect="auto", cmap="Blues", vmin=0)
    axis.set_ylabel(f"layer {layer}\nexpert")
    figure.colorbar(shown, ax=axis, label="weight")
axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
plt.show()

# %% [markdown]
# A token's experts differ from one another, and their weights always have the same sum, `routed_scaling_factor`.

# %%
for layer in layers:
    assert chosen[layer].shape == (len(words), config.num_experts_per_tok)
    assert all(len(set(row)) == config.num_experts_per_tok for row in chosen[layer])
    np.testing.assert_allclose(weights[layer].sum(-1), config.routed_scaling_factor, rtol=1e-5)

# %% [markdown]
# ## Pictures and words go to different experts


# %%
def load(rows):
    """Returns the share of choices that each expert has in `rows`."""
    return np.bincount(rows.ravel(), minlength=config.n_routed_experts) / rows.size


figure, axes = plt.subplots(1, len(layers), figsize=(5 * len(layers), 3), layout="constrained", sharey=True)
apart = {}
for axis, layer in zip(np.atleast_1d(axes), layers, strict=True):
    seen, read = load(chosen[layer][is_picture]), load(chosen[layer][~is_picture])
    apart[layer] = np.abs(seen - read).sum() / 2
    at = np.arange(config.n_routed_experts)
    axis.bar(at - 0.2, seen, 0.4, label="picture")
    axis.bar(at + 0.2, read, 0.4, label="text")
    axis.set_title(f"layer {layer}: {apart[layer]:.0%} of the load differs")
    axis.set_xlabel("expert")
    axis.legend()
np.atleast_1d(axes)[0].set_ylabel("share of choices")
plt.show()

# %%
assert max(apart.values()) > 0.25
# Training keeps the experts in use: in each layer, text alone reaches nearly all of them
assert all(np.count_nonzero(load(chosen[layer])) > 0.7 * config.n_routed_experts for layer in layers)
