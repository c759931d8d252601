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
import matplotlib.pyplot as plt
import numpy as np

import kimi_jax
from kimi_jax.looking import look

folder = kimi_jax.small.path(MODEL) if MODEL in kimi_jax.small.NAMES else MODEL
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)

# %% [markdown]
# A list, a question about it, and the right answer: where does the model look while it writes the number?

# %%
things = {"red dog": 41, "blue cat": 73, "old house": 18, "tiny boat": 96, "gold ring": 27, "big tree": 64}
listed = ", ".join(f"{name} {number}" for name, number in things.items())
asked = "tiny boat"
question = f"Remember: {listed}.\nWhich number has the {asked}?"
answer = kimi_jax.answer(model, question, thinking=False, max_new_tokens=24, processor=processor)
print(answer.content)
assert answer.content == f"{asked} {things[asked]}"

# %%
prompt = processor(question, thinking=False)
tokens = np.concatenate([prompt.tokens, np.asarray(answer.token_ids)[None]], axis=1)
words = [processor.tokenizer.decode([token]).replace("\n", "↵") for token in tokens[0]]
found = look(model, tokens, what=["kda", "attention"])

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
# The row of the last attention layer for the token before each token of the answer.

# %%
layer = max(found.attention)
weights = np.asarray(found.attention[layer], np.float64)[0]  # [heads, tokens, tokens]
first = prompt.tokens.shape[1] - 1
rows = weights[:, first:-1].mean(0)  # the heads' mean
figure, axis = plt.subplots(figsize=(11, 3), layout="constrained")
shown = axis.imshow(rows, aspect="auto", cmap="viridis")
axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
axis.set_yticks(range(len(rows)), [f"→ {word}" for word in words[first + 1 :]], fontsize=7)
figure.colorbar(shown, ax=axis, label="attention")
axis.set_title(f"layer {layer}: from where the next token of the answer comes")
plt.show()

# %% [markdown]
# While the number is written, attention is at the thing that was asked for, far more than its share of the text.

# %%
text = "".join(words)
begins = np.cumsum([0, *map(len, words)])
entry = f"{asked} {things[asked]}"
where = [i for i in range(first) if text.index(entry) <= begins[i] < text.index(entry) + len(entry)]
number = str(things[asked])
spoken = text.rindex(number)
writes = [i for i in range(first + 1, len(words)) if begins[i] < spoken + len(number) and begins[i + 1] > spoken]
there = weights[:, [i - 1 for i in writes]][:, :, where].sum(-1).max(0)  # of the head that looks there most
print(f"attention at {entry!r}: {there.round(2)}, {len(where)} of {len(words)} tokens")
assert there.max() > 3 * len(where) / len(words)

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
