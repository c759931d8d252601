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
# # Plan a pod
#
# Which slices hold a model, and how many tokens a second can they give at most? The planner computes it from the
# model's shapes and the devices' data sheets: nothing here was run on a TPU or GPU, and nothing is compiled.

# %%
MODEL = "kimi-linear-48b"  # a preset, or a folder with a config.json

# %%
import contextlib
import io
import json

import matplotlib.pyplot as plt

from kimi_jax.cli import main

SLICES = ["v5e:2x2", "v5e:2x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1"]


def plan(*flags):
    """Returns the records that `kimi-jax plan --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["plan", "--model", MODEL, "--no-compile", "--json", *flags]) == 0
    return json.loads(out.getvalue())


# %% [markdown]
# ## Which slices hold it
#
# Decoding 16 sequences of 8,192 tokens: the memory of one device, in per cent of what a program may use. A slice
# that is too small is refused, with what it would need.

# %%
job = ("--batch", "16", "--context", "8192")
records = plan(*job, *(part for name in SLICES for part in ("--topology", name)))
plans = [record for record in records if "error" not in record]
refused = [record for record in records if "error" in record]
for record in refused:
    print(record["topology"], record["short"])

# %%
PARTS = ("experts", "attention", "embeddings", "other_weights", "vision", "cache", "temporaries")
COLOURS = ("#31688e", "#35b779", "#90d743", "#b8a9c9", "#8c6bb1", "#f9a03f", "#777777")
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for row, record in enumerate(records):
    if "error" in record:
        share = 100 * record["needs"]["bytes"] / record["needs"]["available"]
        axis.barh(row, min(share, 150), color="tab:red")
        axis.text(2, row, f"refused: needs {share:.0f} %", va="center", color="white")
        continue
    begin, memory = 0.0, record["memory"]
    for part, colour in zip(PARTS, COLOURS, strict=True):
        share = 100 * memory[part] / memory["available"]
        label = part.replace("_", " ") if record is plans[0] else None
        axis.barh(row, share, left=begin, color=colour, label=label)
        begin += share
axis.axvline(100, color="black", linewidth=1)
axis.set_yticks(range(len(records)), [record["topology"] for record in records])
axis.invert_yaxis()
axis.set_xlabel("% of a device's memory")
figure.legend(loc="outside right center")
plt.show()

# %%
assert plans and refused  # some slices hold it, some do not
for record in plans:
    memory = record["memory"]
    assert sum(memory[part] for part in PARTS) + memory["headroom"] == memory["available"]
    assert memory["headroom"] >= 0
assert all(record["needs"]["bytes"] > record["needs"]["available"] for record in refused)

# %% [markdown]
# ## Chips against tokens a second
#
# The most that a step's bound allows: the longest of products, memory and links, as if all overlapped.

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for record in plans:
    point = record["chips"], record["tokens_per_second"]
    axis.scatter(*point, color="tab:blue")
    axis.annotate(
        f"{record['topology']}, by {record['step']['bound_by']}", point, xytext=(6, 4), textcoords="offset points"
    )
chips = sorted({record["chips"] for record in plans})
axis.set_xscale("log", base=2)
axis.set_yscale("log")
axis.set_xticks(chips, map(str, chips))
axis.set_xlim(chips[0] / 1.2, chips[-1] * 2)
axis.margins(y=0.2)
axis.set_xlabel("chips")
axis.set_ylabel("tokens/s at most")
plt.show()

# %% [markdown]
# ## What a longer context costs
#
# One slice, from 8,192 tokens to 262,144: only the cache grows.

# %%
contexts = [8192, 32768, 131072, 262144]
name, mesh = plans[-1]["topology"], plans[-1]["mesh"]
same = ("--batch", "16", "--topology", name, "--mesh", ",".join(f"{axis}={size}" for axis, size in mesh.items()))
longer = [plan(*same, "--context", str(context))[0] for context in contexts]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.loglog(contexts, [record["memory"]["cache"] / 1e9 for record in longer], "o-", label="cache")
axis.loglog(contexts, [record["memory"]["experts"] / 1e9 for record in longer], "s-", label="experts")
axis.set_xlabel("tokens of context")
axis.set_ylabel("GB of a device")
axis.set_title(name)
axis.legend()
plt.show()
assert len({record["memory"]["experts"] for record in longer}) == 1
assert longer[-1]["memory"]["cache"] > 8 * longer[0]["memory"]["cache"]
