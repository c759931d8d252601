"""Runs rows that have a cache of their own, for tests that compare logits: prompts in chunks, then a token at a
time."""

import numpy as np

from kimi_jax.runtime.batch import padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling


class WholeRows:
    """Holds a cache for `rows` rows of up to `capacity` tokens, row i in slot i, pages in order."""

    def __init__(self, model, rows, capacity):
        self.program = Program(model)
        self.table = pages_in_order(rows, capacity, self.program.data, self.program.sequence)
        self.cache = self.program.cache(self.table.size, rows)
        self.lengths = np.zeros(rows, np.int32)

    def batches(self, tokens, lengths, chunk=2048, index=None, media_tokens=None):
        rows, vocab = len(self.lengths), self.program.config.text.vocab_size
        return prompts(
            np.asarray(tokens, np.int32), np.asarray(lengths), self.table, chunk=chunk, max_new_tokens=1,
            sampling=[Sampling()] * rows, seeds=np.zeros(rows, np.uint64), stop_ids=padded_stop_ids((), rows, vocab),
            media_index=index, media_tokens=media_tokens,
        )  # fmt: skip

    def prefill(self, tokens, lengths, chunk=2048):
        """Runs prompts, and returns the logits after each row's last token."""
        logits = np.zeros((len(lengths), self.program.config.text.vocab_size), np.float32)
        for batch in self.batches(tokens, lengths, chunk):
            self.cache, new = self.program.logits(self.cache, batch)
            logits = np.where(batch.choosing[:, None], new, logits)
        self.lengths = np.asarray(lengths).copy()
        return logits

    def next_batch(self, tokens):
        """Returns the decode step that takes these tokens, [rows]."""
        template = next(self.batches(np.zeros((len(self.lengths), 1)), self.lengths))
        step = template.next_token(self.lengths, None)
        step.tokens[:, 0] = tokens
        return step

    def step(self, tokens):
        """Runs one more token of each row, and returns the logits after it."""
        self.cache, logits = self.program.logits(self.cache, self.next_batch(tokens))
        self.lengths = self.lengths + 1
        return np.asarray(logits)
