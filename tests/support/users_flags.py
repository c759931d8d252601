"""Logits of golden models as users compute them: XLA's own flags, and nothing checked at run time.

Its arguments: the file that the arrays are written to, then a folder of each checkpoint, named after its golden, and
what of that is computed, "text" or "prompt". Run by test_goldens_at_users_flags.py in a process of its own, since XLA
reads its flags once.
"""

import sys
from pathlib import Path

import cases
import jax.numpy as jnp
import numpy as np

import kimi_jax

destination, *asked = sys.argv[1:]
found = {}
for folder, kind in zip(map(Path, asked[::2]), asked[1::2], strict=True):
    golden, model = cases.golden(folder.name), kimi_jax.load(folder, dtype=jnp.float32)
    if kind == "text":
        logits = np.asarray(model(golden["text_tokens"]))
        found[f"{folder.name} text"] = np.take_along_axis(logits, golden["text_positions"][..., None], axis=1)
    else:
        grids = cases.IMAGE_GRIDS[list(cases.PROMPT_IMAGES)]
        media = kimi_jax.Media(np.concatenate([cases.media(grid) for grid in grids]), grids)
        logits = np.asarray(model(golden["prompt_tokens"][None], media))[0]
        found[f"{folder.name} prompt"] = logits[golden["prompt_positions"]]
np.savez(destination, **found)
