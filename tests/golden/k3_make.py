"""Makes k3.npz: what the float64 reference of k3_reference.py computes on the toy "k3" of cases.py. Needs no torch.

    PYTHONPATH=. python tests/golden/k3_make.py

It stores the sha256 of the checkpoint, and (P positions, V the whole vocabulary)
    text_tokens [150] int32, text_positions [P], text_logits [P, V], text_prefix [layers, P, d] after each layer,
    text_snapshots [3, P, d], text_experts [layers with experts, 150, 3], text_states [KDA layers, h, k, v] at the end
    greedy_prompt [11] int32, greedy_tokens [24], greedy_margins [24] (top 1 - top 2)
    features [tokens, d] of the items of K3_GRIDS, one after another
    prompt_tokens [T] with the placeholders of these items expanded, prompt_positions [P], prompt_logits [P, V]
    router_margin, the least difference between the scores of an expert that was chosen and one that was not
Prompts are drawn until no router and no greedy step is decided by less than ten times a float32 model's error.
"""

import numpy as np
from cases import HERE, K3_GRIDS, MARGIN, NEW_TOKENS, TOYS, config, fingerprint, media
from k3_reference import Reference

from checkpoints.toy import published_tensors

ROUTER_MARGIN = 5e-5
# The ends, the borders of chunks of 16, 64 and 128 tokens, and the last ones, which decoding continues with
POSITIONS = np.array([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 127, 128, *range(139, 150)], np.int32)


def main() -> None:
    reference = Reference(config("k3"), dict(published_tensors(config("k3"), TOYS["k3"].seed)))
    random = np.random.RandomState(TOYS["k3"].seed)
    placeholder = config("k3")["media_placeholder_token_id"]

    def draw(length: int) -> np.ndarray:
        return random.randint(0, 512, length).astype(np.int32)

    margin = 0.0
    while margin < ROUTER_MARGIN:
        tokens = draw(150)
        logits, trace = reference.logits(tokens)
        margin = trace.margin
    out = {
        "sha256": np.array(fingerprint("k3")),
        "text_tokens": tokens,
        "text_positions": POSITIONS,
        "text_logits": logits[POSITIONS],
        "text_prefix": np.stack(trace.prefix)[:, POSITIONS],
        "text_snapshots": np.stack(trace.snapshots)[:, POSITIONS],
        "text_experts": np.stack(list(trace.experts.values())).astype(np.int32),
        "text_states": np.stack(list(trace.states.values())),
    }
    margins = [margin]

    gaps: list[float] = []
    while len(gaps) < NEW_TOKENS:
        ids, gaps = list(draw(11)), []
        for _ in range(NEW_TOKENS):
            logits, trace = reference.logits(np.array(ids))
            best = np.sort(logits[-1])[-2:]
            if trace.margin < ROUTER_MARGIN or best[1] - best[0] < MARGIN:
                break
            ids.append(int(logits[-1].argmax()))
            gaps.append(float(best[1] - best[0]))
            margins.append(trace.margin)
    out |= {"greedy_prompt": np.array(ids[:11], np.int32), "greedy_tokens": np.array(ids[11:], np.int32)}
    out["greedy_margins"] = np.array(gaps)

    items = [reference.encode(media(grid), grid) for grid in K3_GRIDS]
    out["features"] = np.concatenate(items)
    margin = 0.0
    while margin < ROUTER_MARGIN:
        parts = [draw(5)]
        for item in items:
            parts += [np.full(len(item), placeholder, np.int32), draw(4)]
        tokens = np.concatenate(parts)
        logits, trace = reference.logits(tokens, out["features"])
        margin = trace.margin
    at = np.linspace(0, len(tokens) - 1, 14).round().astype(np.int32)
    out |= {"prompt_tokens": tokens, "prompt_positions": at, "prompt_logits": logits[at]}
    out["router_margin"] = np.array(min(*margins, margin))
    for name, array in out.items():
        if array.dtype == np.float64 and array.ndim > 1:
            out[name] = array.astype(np.float32)
            print(f"{name} {array.shape}: rms {np.sqrt((array**2).mean()):.2f}")
    path = HERE / "k3.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, least router margin {out['router_margin']:.1e}")


if __name__ == "__main__":
    main()
