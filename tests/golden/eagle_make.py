"""Makes eagle.npz: what the float64 reference of eagle_reference.py computes for the heads of cases.py. Needs no torch.

    PYTHONPATH=. python tests/golden/eagle_make.py

For each kind of head it stores, under "kind/",
    sha256 of the checkpoint, and the number `draw` of the inputs of `cases.eagle_inputs`
    logits [P, words] and vectors [P, 64] (for the next draft) at EAGLE_POSITIONS of one pass over all 40
    drafts [rows, 5] of the rows that take the first EAGLE_LENGTHS of them, and `margin`, the least difference between
        a drafted word and the second best
Inputs are drawn until no draft is decided by less than ten times a float32 head's error.
"""

import numpy as np
from cases import EAGLE_LENGTHS, EAGLE_POSITIONS, EAGLE_SEEDS, HERE, MARGIN, eagle_config, eagle_inputs, fingerprint
from eagle_reference import EagleReference

from checkpoints.toy import published_tensors

COUNT = 5


def main() -> None:
    out = {}
    for kind, seed in EAGLE_SEEDS.items():
        config = eagle_config(kind)
        tensors = dict(published_tensors(config, seed))
        margin, draw = 0.0, -1
        while margin < MARGIN:
            draw += 1
            aux, tokens, embeddings = eagle_inputs(kind, draw)
            head = EagleReference(config, tensors, embeddings)
            rows = [head.draft(aux[:length], tokens[:length], COUNT) for length in EAGLE_LENGTHS]
            margin = min(margin for _, margin in rows)
        logits, vectors = head.run(head.combine(aux), tokens)
        out |= {
            f"{kind}/sha256": np.array(fingerprint(kind)),
            f"{kind}/draw": np.array(draw),
            f"{kind}/logits": logits[EAGLE_POSITIONS].astype(np.float32),
            f"{kind}/vectors": vectors[EAGLE_POSITIONS].astype(np.float32),
            f"{kind}/drafts": np.array([drafts for drafts, _ in rows], np.int32),
            f"{kind}/margin": np.array(margin),
        }
    np.savez_compressed(HERE / "eagle.npz", **out)


main()
