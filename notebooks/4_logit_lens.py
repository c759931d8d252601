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
# # The logit lens
#
# The head makes words of the last layer's vectors. Given an earlier layer's vectors, it shows what the model would
# say if it had to stop there (nostalgebraist, *interpreting GPT: the logit lens*, 2020).

# %%
MODEL = "k25-digits"

# %%
import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np

import kimi_jax
from kimi_jax.looking import look

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)

# %%
prompt = processor("What number is in the picture?", images=[kimi_jax.small.picture("427")])
said = kimi_jax.generate(model, prompt.tokens, 24, media=prompt.media)[0]
said = said[: list(said).index(processor.tokenizer.special_tokens["<|im_end|>"]) + 1]
tokens = np.concatenate([prompt.tokens, said[None]], axis=1)
found = look(model, tokens, prompt.media, what=["hidden"])
first = prompt.tokens.shape[1] - 1  # the token after which the answer begins
logits = {layer: model.logits(model.model.norm(x), model.partition) for layer, x in found.hidden.items()}
chances = {layer: np.asarray(jax.nn.softmax(x, -1), np.float64)[0, first:-1] for layer, x in logits.items()}

# %% [markdown]
# Each cell is a layer's best guess of the next token, and its colour the guess's probability.

# %%
layers = sorted(chances)
answer = [processor.tokenizer.decode([token]) for token in said]
figure, axis = plt.subplots(figsize=(12, 0.6 * len(layers) + 1.6), layout="constrained")
best = np.stack([chances[layer].max(-1) for layer in layers])
shown = axis.imshow(best, aspect="auto", cmap="YlGn", vmin=0, vmax=1)
for row, layer in enumerate(layers):
    for column, token in enumerate(chances[layer].argmax(-1)):
        word = processor.tokenizer.decode([token]).strip() or "␣"
        colour = "white" if best[row, column] > 0.7 else "black"
        axis.text(column, row, word[:9], ha="center", va="center", fontsize=7, color=colour)
axis.set_yticks(range(len(layers)), [f"after layer {layer}" for layer in layers])
axis.set_xticks(range(len(answer)), answer, rotation=45, ha="right")
axis.set_xlabel("what the model wrote")
figure.colorbar(shown, ax=axis, label="probability")
plt.show()

# %% [markdown]
# The last layer's guesses are what the model wrote. Earlier layers agree with it less, and are further from it in
# Kullback-Leibler divergence.

# %%
last = chances[layers[-1]]
agree = [float((chances[layer].argmax(-1) == said).mean()) for layer in layers]
far = [float((last * (np.log(last + 1e-30) - np.log(chances[layer] + 1e-30))).sum(-1).mean()) for layer in layers]
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, values, label in zip(
    axes, (agree, far), ("guesses that are right", "KL to the last layer, nats"), strict=True
):
    axis.plot(layers, values, "o-")
    axis.set_xlabel("layer")
    axis.set_ylabel(label)
    axis.set_xticks(layers)
plt.show()

# %%
assert agree[-1] == 1.0 and agree[0] < 0.7
assert all(earlier > later for earlier, later in itertools.pairwise(far))
