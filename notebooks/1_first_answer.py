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
# # A first answer
#
# A model answers in text, looks at a picture, calls a tool, and thinks first or not. `MODEL` names a small model of
# the package, or the folder of any converted or published checkpoint; what is claimed below is claimed of the small
# one.

# %%
MODEL = "k25-digits"

# %%
import json

import jax
import matplotlib.pyplot as plt
from PIL import Image

import kimi_jax

folder = MODEL
if MODEL in kimi_jax.small.NAMES:
    folder = kimi_jax.small.path(MODEL)
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of a small model's time is compiling
model = kimi_jax.load(folder)
processor = kimi_jax.Processor.from_folder(folder)


def ask(messages, tools=None, thinking=True, images=()):
    """Answers with at most 120 tokens (with any prompt below, two pages of the cache: one program)."""
    return kimi_jax.answer(model, messages, tools, thinking, max_new_tokens=120, images=images, processor=processor)


# %% [markdown]
# ## Text

# %%
hello = ask("Hello!", thinking=False)
print(hello.content)
assert hello.finish_reason == "stop" and hello.content

# %% [markdown]
# ## A picture, with thinking and without
#
# With `thinking=True` the prompt ends in `<think>`, and the model writes what it sees before it answers.

# %%
picture = kimi_jax.small.picture("427")
question = "What number is in the picture?"
answers = {thinking: ask(question, thinking=thinking, images=[picture]) for thinking in (True, False)}
figure, axes = plt.subplots(1, 2, figsize=(8, 2), layout="constrained")
for axis, said in zip(axes, answers.values(), strict=True):
    axis.imshow(Image.open(picture).convert("L"), cmap="gray")
    axis.set_title(f"{'thinks: ' + said.reasoning if said.reasoning else 'answers at once'}\nKimi: {said.content}")
    axis.axis("off")
plt.show()

# %%
assert answers[True].content == answers[False].content == "427"
assert answers[True].reasoning and not answers[False].reasoning
assert len(answers[True].token_ids) > len(answers[False].token_ids)

# %% [markdown]
# ## A tool
#
# The model asks for a call in OpenAI's schema; the program runs it, and the model puts the result into words.

# %%
pictures = [kimi_jax.small.picture(number) for number in ("58", "316")]
parts = [{"type": "image_url", "image_url": {"url": one}} for one in pictures]
messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Add the numbers."}]}]
tools = [kimi_jax.small.ADD_TOOL]
call = ask(messages, tools)
assert call.finish_reason == "tool_calls"
function = call.tool_calls[0]["function"]
print(function["name"], function["arguments"])

# %%
arguments = json.loads(function["arguments"])
messages += [
    {"role": "assistant", "content": "", "reasoning_content": call.reasoning, "tool_calls": call.tool_calls},
    {"role": "tool", "tool_call_id": call.tool_calls[0]["id"], "content": str(arguments["a"] + arguments["b"])},
]
said = ask(messages, tools)
print(said.content)
assert arguments == {"a": 58, "b": 316} and "374" in said.content
