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
# # What a KDA state remembers, and what attention sees
#
# Kimi Linear has layers of two kinds. A KDA layer keeps a matrix of one size, however long the text: each token
# fades what is there a little, and writes. An attention layer keeps every token, and looks at each again.

# %%
MODEL = "kimi-linear-small"

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import kimi_jax
from kimi_jax.looking import look

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)

# %% [markdown]
# A list, a question about it, and the right answer. One run over all of it shows what goes on while the answer is
# written.

# %%
things = {"red dog": 41, "blue cat": 73, "old house": 18, "tiny boat": 96, "gold ring": 27, "big tree": 64}
listed = ", ".join(f"{name} {number}" for name, number in things.items())
asked = "tiny boat"
prompt = processor(f"Remember: {listed}.\nWhich number has the {asked}?", thinking=False)
end = processor.tokenizer.special_tokens["<|im_end|>"]
answer = [*processor.tokenizer.encode(f"{asked} {things[asked]}"), end]
tokens = np.concatenate([prompt.tokens, [answer]], axis=1)
words = [processor.tokenizer.decode([token]).replace("\n", "↵") for token in tokens[0]]
found = look(model, tokens, what=["hidden", "kda", "attention"])
first = prompt.tokens.shape[1] - 1  # after this token the answer begins

# %% [markdown]
# ## What is left of each token in the states at the end
#
# A head's keys have channels, and each channel has its own rate of fading. What a token wrote is multiplied by the
# decays of all tokens after it; that product is what fading leaves of it. (Later tokens with a like key also
# overwrite it.)


# %%
def left(decay):
    """Returns the product of the decays after each token: [tokens, heads, channels] of the same."""
    after = np.cumsum(np.log(np.maximum(decay, 1e-30))[::-1], axis=0)[::-1]
    return np.exp(np.concatenate([after[1:], np.zeros_like(after[:1])]))


kept = {layer: left(np.asarray(memory.decay, np.float64)[0]) for layer, memory in found.kda.items()}
figure, axes = plt.subplots(len(kept), 1, figsize=(11, 2.0 * len(kept)), layout="constrained", sharex=True)
for axis, (layer, share) in zip(np.atleast_1d(axes), kept.items(), strict=True):
    channels = np.sort(share.reshape(len(words), -1), axis=1)[:, ::-1]
    shown = axis.imshow(channels.T, aspect="auto", cmap="magma", vmin=0, vmax=1)
    axis.set_ylabel(f"layer {layer}\nchannels")
    figure.colorbar(shown, ax=axis, label="left at the end")
axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
plt.show()

# %%
middle = len(words) // 2
for layer, share in kept.items():
    slow, fast = share[middle].max(), share[middle].min()
    print(f"layer {layer}: of the token in the middle, the slowest channel keeps {slow:.0%} and the fastest {fast:.1e}")
    assert slow > 100 * fast  # one layer remembers at many rates
    assert (np.diff(share, axis=0) >= 0).all()  # what came later has faded less

# %% [markdown]
# ## What attention sees
#
# The rows of the attention layer for the token before each token of the answer.

# %%
layer = max(found.attention)
weights = np.asarray(found.attention[layer], np.float64)[0, :, first:-1]  # [heads, tokens of the answer, tokens]
rows = weights.mean(0)  # the heads' mean
figure, axis = plt.subplots(figsize=(11, 3), layout="constrained")
shown = axis.imshow(rows, aspect="auto", cmap="viridis")
axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
axis.set_yticks(range(len(rows)), [f"→ {word}" for word in words[first + 1 :]], fontsize=7)
figure.colorbar(shown, ax=axis, label="attention")
axis.set_title(f"layer {layer}: to which tokens the writer of the next one attends")
plt.show()
np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-4)

# %% [markdown]
# In this small model attention is spread thin, and the entry that was asked for has no more of it than its share.
# Then where does the number come from? Each layer's guess of the answer says: from the states.

# %%
chances = {}
for number, x in found.hidden.items():
    said = jax.nn.softmax(model.logits(model.model.norm(x), model.partition), -1)
    chances[number] = np.asarray(said, np.float64)[0, first:-1][range(len(answer)), answer]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
shown = axis.imshow(np.stack(list(chances.values())), aspect="auto", cmap="YlGn", vmin=0, vmax=1)
kinds = ["KDA" if number in found.kda else "attention" for number in chances]
axis.set_yticks(range(len(chances)), [f"after layer {i}, {kind}" for i, kind in zip(chances, kinds, strict=True)])
axis.set_xticks(range(len(answer)), words[first + 1 :])
figure.colorbar(shown, ax=axis, label="probability of the right token")
plt.show()

# %%
memory, last = max(found.kda), max(chances)
assert memory < layer  # all of KDA comes before attention
assert chances[last].min() > 0.9  # the model knows the answer,
assert chances[memory].min() > 0.9  # and has known it before attention looked:
assert chances[min(chances)].mean() < 0.5  # the KDA layers found it one after another
assert weights.max() < 0.2  # attention has no token that it looks at much

# %% [markdown]
# ## What each costs
#
# After the last token a KDA layer has one state, however long the text was; attention has a vector for each token.

# %%
state = found.kda[min(found.kda)].state
text_config = model.config.text
latents = text_config.kv_lora_rank + text_config.qk_rope_head_dim
lengths = np.array([64, 256, 1024, 4096, 16384])
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.loglog(lengths, np.full(len(lengths), state.size), "o-", label="a KDA layer's state")
axis.loglog(lengths, lengths * latents, "s-", label="an attention layer's latents")
axis.set_xlabel("tokens")
axis.set_ylabel("numbers kept")
axis.legend()
plt.show()
assert state.size < latents * 1024  # from some length on the state is the smaller
