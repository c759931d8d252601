"""Makes rope.npz: transformers' logits on the "k2" checkpoint with the `rope_parameters` of cases.py.

    pip install -e .[oracle]
    python tests/golden/make_rope.py

`logits` [cases, P, V] are those of the first row of k2.npz at its positions; `released` is k2.npz's own configuration.
`error_logits` is the largest difference between float32 and float64 in the reference.
"""

import numpy as np
import torch
import transformers
from cases import HERE, ROPE_PARAMETERS, golden
from make import REFERENCE_ERROR, load, runner


def main() -> None:
    k2 = golden("k2")
    tokens, positions = k2["text_tokens"][0], k2["text_positions"][0]
    assert k2["text_lengths"][0] == len(tokens)
    single, double = (
        np.stack(
            [
                runner(load("k2", dtype, rope_scaling=None, rope_parameters=values), dtype)(tokens)[positions]
                for values in ROPE_PARAMETERS.values()
            ]
        )
        for dtype in (torch.float32, torch.float64)
    )
    error = np.abs(single - double).max()
    print(f"logits {single.shape}: float32 error {error:.1e}")
    assert error < REFERENCE_ERROR
    logits = single.astype(np.float32)
    np.testing.assert_array_equal(logits[list(ROPE_PARAMETERS).index("released")], k2["text_logits"][0])
    np.savez_compressed(HERE / "rope.npz", logits=logits, error_logits=error, transformers=transformers.__version__)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    main()
