"""Makes gradients.npz: gradients of the toys of `cases.GRADIENTS`, by torch's autograd through transformers.

    pip install -e .[oracle]
    python tests/golden/gradients_make.py

All is computed in float64, with eager attention and experts, and rounded to float32. The loss is the mean of the
cross-entropies of all tokens but the first of each of `cases.gradient_documents`, which are run one by one. For each
toy NAME:
    NAME/loss, and NAME/TENSOR under the names of the published checkpoint
The gradients pass through the conversion of names that `save_pretrained` does for weights.
"""

import tempfile
from pathlib import Path

import cases
import make
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file


def gradients(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one toy."""
    model = make.load(name, torch.float64)
    documents, losses = cases.gradient_documents(name), []
    with make.precision(torch.float64):
        for tokens, grids in documents:
            media = {}
            if len(grids):
                patches = np.concatenate([cases.media(grid) for grid in grids])
                media["pixel_values"] = torch.from_numpy(patches).double()
                media["image_grid_thw"] = torch.from_numpy(grids.astype(np.int64))
            ids = torch.from_numpy(tokens.astype(np.int64))
            logits = model(input_ids=ids[None], use_cache=False, **media).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        loss = sum(losses) / sum(len(tokens) - 1 for tokens, _ in documents)
        loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    for buffer in model.buffers():
        buffer.zero_()
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    return {"loss": loss.detach().numpy(), **tensors}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    cases.CASES = make.CASES = cases.GRADIENTS
    out = {}
    for name in cases.GRADIENTS:
        out |= {f"{name}/{key}": array for key, array in gradients(name).items()}
    path = cases.HERE / "gradients.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
