"""Rows that have a cache of their own, for tests that want logits: prompts in chunks, then a token at a time."""

import numpy as np

from kimi_jax.runtime.batch import padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling


class WholeRows:
    """`rows` rows of up to `capacity` tokens, row i in slot i, its pages in order."""

    def __init__(self, model, rows, capacity):
        self.program = Program(model)
        self.table = pages_in_order(rows, capacity, self.program.data, self.program.sequence)
        self.cache = self.program.cache(self.table.size, rows)
        self.lengths = np.zeros(rows, np.int32)

    def batches(self, tokens, lengths, chunk=2048, index=None, media=None):
        rows, vocab = len(self.lengths), self.program.config.text.vocab_size
        return prompts(
            np.asarray(tokens, np.int32), np.asarray(lengths), self.table, chunk=chunk, max_new_tokens=1,
            sampling=[Sampling()] * rows, seeds=np.zeros(rows, np.uint64), stop_ids=padded_stop_ids((), rows, vocab),
            media_index=index, media=media,
        )  # fmt: skip

    def prefill(self, tokens, lengths, chunk=2048):
        """Logits after each row's last token."""
        logits = np.zeros((len(lengths), self.program.config.text.vocab_size), np.float32)
        for batch in self.batches(tokens, lengths, chunk):
            self.cache, new = self.program.logits(self.cache, batch)
            logits = np.where(batch.choosing[:, None], new, logits)
        self.lengths = np.asarray(lengths).copy()
        return logits

    def next_batch(self, tokens):
        """The decode step that takes these tokens, [rows]."""
        template = next(self.batches(np.zeros((len(self.lengths), 1)), self.lengths))
        step = template.next_token(self.lengths, None)
        step.tokens[:, 0] = tokens
        return step

    def step(self, tokens):
        """Logits after one more token of each row."""
        self.cache, logits = self.program.logits(self.cache, self.next_batch(tokens))
        self.lengths = self.lengths + 1
        return np.asarray(logits)
