"""The engine: a thread that plans a step, sends it, and reads the step before, for as long as there is work.

Requests come from any thread or event loop, and events go back to each. Nothing that one request brings ends another:
what cannot be served is refused in words when it is submitted, and a row whose numbers are not finite ends alone.
"""

import asyncio
import collections
import functools
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_jax.engine.dispatched import Dispatched
from kimi_jax.engine.hosts import LeadingRunner, common_memory
from kimi_jax.engine.job import Job, make_job, placeholders, prompt_ids
from kimi_jax.engine.mailbox import Mailbox
from kimi_jax.engine.mask_provider import MaskError
from kimi_jax.engine.pages import PagePool
from kimi_jax.engine.requests import Event, FinishReason, QueueFullError, Request, Result, Times, Usage, collect
from kimi_jax.engine.runner import PACKED, Runner
from kimi_jax.engine.scheduler import Scheduler
from kimi_jax.engine.sequence import Sequence, Status, Step
from kimi_jax.engine.shard import Shard
from kimi_jax.engine.sizes import pool_sizes
from kimi_jax.engine.snapshots import SnapshotPool
from kimi_jax.engine.stats import Stats
from kimi_jax.engine.stream import Stream
from kimi_jax.links import Links
from kimi_jax.model.eagle import EagleHead
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.splice import Media, media_index
from kimi_jax.runtime.batch import Finish
from kimi_jax.runtime.drafts import DRAFT_TOKENS, Draft, DraftCounts, check_draft_tokens
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.text import Tokenizer


class Engine:
    """Serves many requests at once from one copy of a model.

    slots: sequences that are computed at one time.
    cache_memory: bytes of each device for the cache ("1GiB"); None is what the devices have left, at most what `slots`
        sequences of the longest length take.
    prefill_chunk: the most tokens of a prompt that are taken in beside a decode step: less makes other answers
        smoother, more makes prompts faster.
    max_length: the longest prompt with its answer; None is the model's longest, or what the cache holds if it is less.
    tokenizer: makes text of tokens, for requests with stop strings.
    max_waiting: requests that wait at most; more are refused with `QueueFullError`.
    progress: is given the name of each program before it is compiled.
    draft, draft_tokens: makes a drafter for each request, such as `PromptLookup`, or is a head from `load_head`; it
        proposes at most so many tokens at a time, 1 to 7. None drafts nothing. Answers are the same.
    links: connect this process, number 0 of several with one mesh, with the others; these call `follow`.

    Raises ValueError where the mesh's data axis does not divide `slots`, the memory holds no sequence, or
    `draft_tokens` is out of range, and ConfigError for a head that was made for another model.
    """

    def __init__(
        self,
        model: Kimi,
        *,
        slots: int = 16,
        cache_memory: int | str | None = None,
        prefill_chunk: int = 512,
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
        max_waiting: int = 1024,
        progress: Callable[[str], Any] | None = None,
        draft: Draft | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        links: Links | None = None,
    ):
        self.model, self.config = model, model.config
        self.links = links
        check_draft_tokens(draft_tokens)
        drafter = EagleDrafter(draft, model) if isinstance(draft, EagleHead) else None
        self.draft, self.draft_tokens = draft, 0 if draft is None else draft_tokens
        self.draft_counts = DraftCounts()
        if links is not None:
            cache_memory = common_memory(links, cache_memory)
        self.sizes = pool_sizes(model, slots, cache_memory, prefill_chunk, max_length, drafter)
        sizes, self.max_waiting, self.tokenizer = self.sizes, max_waiting, tokenizer
        self.runner = (Runner if links is None else functools.partial(LeadingRunner, links))(
            model,
            drafter,
            slots=slots,
            pages=sizes.pages,
            places=sizes.places,
            row_pages=sizes.row_pages,
            chunks=sizes.chunks,
            decode_rows=sizes.decode_rows,
            draft_tokens=self.draft_tokens,
        )
        data, sequence = self.runner.program.data, self.runner.program.sequence
        shards = [
            Shard(
                PagePool(sizes.pages // (data * sequence), sequence),
                list(range(slots // data)),
                SnapshotPool(sizes.places // data) if sizes.recurrent else None,
            )
            for _ in range(data)
        ]
        self.scheduler = Scheduler(shards, sizes.chunks[-1], PACKED if self.runner.packed_chunks else 1)
        for name in self.runner.warm():
            if progress is not None:
                progress(name)
        self._numbers = itertools.count()
        self._jobs: dict[Sequence, Job] = {}
        self._inbox: collections.deque[Job] = collections.deque()
        self._lock = threading.Condition()
        # Each is kept by the requests that use it
        self._mailboxes: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakValueDictionary()
        self._closed = False
        self.failure: BaseException | None = None  # why the engine answers nobody any more
        self._thread = threading.Thread(target=self._loop, name="kimi-jax engine", daemon=True)
        self._thread.start()

    def answer(self, request: Request) -> Result:
        """Waits for a request's whole answer. Raises what `submit` raises."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job = self._enqueue(request, events.put)
        try:
            return collect(events.get)
        finally:
            self._cancel(job)

    def submit(self, request: Request) -> Stream:
        """Takes in a request, and returns its events, to be read with `async for`; closing the iterator cancels.

        Call it where an event loop runs. Raises ValueError, naming what is wrong, for a request that cannot be served,
        `QueueFullError` where too many wait, and RuntimeError where the engine is closed or has failed.
        """
        # The engine holds the queue, not the stream: a stream that nobody holds any more cancels its request
        events, loop = asyncio.Queue[Event](), asyncio.get_running_loop()
        with self._lock:
            mailbox = self._mailboxes.setdefault(loop, Mailbox(loop))

        def deliver(event: Event) -> None:
            mailbox.put(events, event)

        job = self._enqueue(request, deliver)
        return Stream(functools.partial(self._cancel, job), events)

    def stats(self) -> Stats:
        """Returns counts of pages, slots, requests and programs."""
        with self._lock:
            shards, drafts = self.scheduler.shards, self.draft_counts
            return Stats(
                compiled_programs=self.runner.compiled,
                pages=sum(shard.pages.pages for shard in shards),
                free_pages=sum(shard.pages.free for shard in shards),
                slots=self.runner.slots,
                free_slots=sum(len(shard.slots) for shard in shards),
                waiting=len(self.scheduler.waiting) + len(self._inbox),
                running=len(self.scheduler.running),
                drafts=drafts.drafts,
                drafted_tokens=drafts.tokens,
                accepted_tokens=drafts.accepted,
                acceptance_rate=drafts.rate,
                accepted_length=drafts.length,
            )

    def prefix_ready(self, tokens: Any, media: Media | None = None) -> bool:
        """Returns whether the full pages of `tokens` (128 each, at least one) need not be computed again."""
        ids = prompt_ids(tokens, self.config)
        index = media_index(ids[None], media, self.config)
        sequence = Sequence(ids.tolist(), len(ids), -1, media=placeholders(media, index, self.config))
        with self._lock:
            return self.scheduler.has_prefix(sequence)

    @property
    def closed(self) -> bool:
        """True once it takes no requests, because it was closed or has failed."""
        return self._closed

    def close(self) -> None:
        """Ends all requests as cancelled, and the engine's thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()
        if isinstance(self.runner, LeadingRunner):
            self.runner.release_followers()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue(self, request: Request, deliver: Callable[[Event], Any]) -> Job:
        limits = self.sizes.max_length
        job = make_job(request, self.config, limits, self.tokenizer, next(self._numbers), deliver)
        with self._lock:
            if self.failure is not None:
                raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self.scheduler.waiting) + len(self._inbox) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already; try again later")
            self._inbox.append(job)
            self._lock.notify()
        return job

    def _cancel(self, job: Job) -> None:
        with self._lock:
            job.cancelled = True
            self._lock.notify()

    def _loop(self) -> None:
        before: Dispatched | None = None
        try:
            while True:
                with self._lock:
                    while not (self._closed or self._inbox or self._jobs or before):
                        self._lock.wait()
                    if self._closed:
                        break
                if before is not None and self._mostly_stepwise():
                    self._read(before)
                    before = None
                self._take_in()
                with self._lock:
                    step = self._next_step()
                dispatched = None if step.empty else self.runner.run(step)
                if before is not None:
                    self._read(before)
                before = dispatched
        except BaseException as failure:  # the device's state is unknown
            self.fail(failure)
        else:
            self._end_all("cancelled", "the engine was closed")

    def fail(self, failure: BaseException) -> None:
        """Ends all requests with an error, and takes no more. It waits for no step: one may never end."""
        with self._lock:
            self.failure = self.failure or failure
            self._end_all("error", f"the engine has failed: {self.failure}")

    def _end_all(self, reason: FinishReason, why: str) -> None:
        with self._lock:
            self._closed = True
            for job in [*self._jobs.values(), *self._inbox]:
                self._end(job, reason, why)
            self._inbox.clear()

    def _mostly_stepwise(self) -> bool:
        """Returns whether at least half of the running rows wait for their token before they go on: a mask depends on
        it, or drafts follow it. Beside other rows they are part of every second step, while those are always a step
        ahead; from here on that would lose more than reading each step before the next."""
        running = self.scheduler.running
        return 2 * sum(sequence.stepwise or bool(sequence.draft) for sequence in running) >= len(running) > 0

    def _take_in(self) -> None:
        """Gives the scheduler what has come."""
        while self._inbox:
            with self._lock:
                job = self._inbox.popleft()
                if job.may_draft and not (self.draft is None or isinstance(self.draft, EagleHead)):
                    job.drafter = self.draft()
                self._jobs[job.sequence] = job
                self.scheduler.add(job.sequence)
            self._guide(job)

    def _next_step(self) -> Step:
        """Ends what is cancelled or late, and plans."""
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.cancelled or now > job.deadline:
                late = None if job.cancelled else f"not finished within {job.request.timeout} s"
                self.scheduler.finish(job.sequence)
                self._end(job, "cancelled", late)
        step = self.scheduler.plan()
        self.draft_counts.drafts += len(step.drafts)
        self.draft_counts.tokens += sum(map(len, step.drafts.values()))
        for sequence in step.admitted:
            job = self._jobs[sequence]
            try:
                self._admit(job)
            except Exception as failure:  # no memory for its pictures, say: it ends alone
                if self.links is not None:  # the other processes may have encoded them
                    raise
                self.scheduler.finish(sequence, sound=False)
                self._end(job, "error", f"its media could not be encoded: {failure}")
                step = step.without(sequence)
        return step

    def _admit(self, job: Job) -> None:
        sequence, request = job.sequence, job.request
        asked = request.top_logprobs is not None
        self.runner.admit(sequence, request.sampling, request.seed, job.stop_ids, banned=job.banned, logprobs=asked)
        if job.index is None or not any(item.stop > sequence.begin for item in sequence.media):
            return  # no picture, or none that is not in the pages found
        if request.media is not None and sequence.number not in self.runner.media:
            index = np.pad(job.index, (0, len(sequence.tokens) - len(job.index)), constant_values=-1)
            self.runner.encode(sequence, request.media, index)

    def _read(self, dispatched: Dispatched) -> None:
        """Waits for a step, and hands its tokens out."""
        results, going = list(dispatched.read()), []
        with self._lock:
            for sequence, tokens, finish, logprobs, drafts in results:
                if sequence.status is Status.DONE:
                    continue
                job = self._jobs[sequence]
                *right, last = tokens
                self.draft_counts.accepted += len(right)
                if finish == Finish.NOT_FINITE:
                    if all(self._hand_out(job, token, Finish.NOT_YET) for token in right):
                        self.scheduler.finish(sequence, sound=False)
                        self._end(job, "error", f"the logits after {job.generated} new tokens are not finite")
                    continue
                self.scheduler.read(sequence, *tokens)
                job.take_logprobs(logprobs)
                goes_on = all(self._hand_out(job, token, Finish.NOT_YET) for token in right)
                if goes_on and self._hand_out(job, last, finish):
                    going.append((job, drafts))
        for job, drafts in going:
            self._guide(job)
            if job.may_draft and job.sequence.status is Status.DECODE:
                found = drafts if job.drafter is None else job.drafter.propose(job.sequence.tokens, self.draft_tokens)
                job.sequence.draft = tuple(found)

    def _hand_out(self, job: Job, token: int, finish: int) -> bool:
        """Hands a new token out, and ends the answer where it is the last. Returns whether the answer goes on."""
        job.generated += 1
        job.first_token = job.first_token or time.monotonic()
        tokens = () if finish == Finish.STOP else job.take(token)
        stopped = job.stop_strings is not None and job.stop_strings.stopped
        if finish == Finish.NOT_YET and not stopped:
            if tokens:
                self._deliver(job, job.event(tokens))
            return True
        self.scheduler.finish(job.sequence, ended=finish != Finish.NOT_YET)
        self._end(job, "stop" if stopped or finish == Finish.STOP else "length", tokens=tokens)
        return False

    def _guide(self, job: Job) -> None:
        """Asks a request's mask provider, if it has one, about the next token, and takes in tokens that it forces.

        The provider is asked without the lock, for which submitting waits.
        """
        sequence = job.sequence
        if job.guide is None:
            return
        try:
            while True:
                answer = sequence.tokens[sequence.prompt :]
                if job.guide.stopped(answer):
                    self._finish(job, "stop")
                    return
                forced = job.guide.forced(answer) if job.request.top_logprobs is None else []
                if not forced:
                    self.runner.masks[sequence.number] = job.guide.mask(answer)
                    return
                with self._lock:
                    if not self._force(job, forced):
                        return
        except MaskError as failure:
            self._finish(job, "error", f"after {job.generated} new tokens {failure}")

    def _finish(self, job: Job, reason: FinishReason, error: str | None = None) -> None:
        with self._lock:
            self.scheduler.finish(job.sequence)
            self._end(job, reason, error)

    def _force(self, job: Job, forced: list[int]) -> bool:
        """Takes in tokens that an answer must go on with, up to its end. Returns whether it goes on after them."""
        sequence = job.sequence
        known = len(sequence.tokens)
        for number, token in enumerate(forced, known + 1):
            finish = Finish.LENGTH if number >= sequence.ends else Finish.NOT_YET
            if not self._hand_out(job, token, Finish.STOP if token in job.stop_ids else finish):
                return False
        self.scheduler.extend(sequence, forced)
        if sequence.status is Status.PREFILL:
            self.runner.count(sequence)
        return True

    def _end(self, job: Job, reason: FinishReason, error: str | None = None, tokens: tuple[int, ...] = ()) -> None:
        self._jobs.pop(job.sequence, None)
        self.runner.forget(job.sequence)
        if job.stop_strings is not None and not job.stop_strings.stopped:
            tokens += job.stop_strings.rest()
        prompt = job.sequence.prompt
        usage = Usage(prompt, job.generated, min(job.sequence.cached or 0, prompt))
        times = Times(job.submitted, job.first_token, time.monotonic())
        self._deliver(job, job.event(tokens, finish_reason=reason, usage=usage, times=times, error=error))

    def _deliver(self, job: Job, event: Event) -> None:
        try:
            job.deliver(event)
        except RuntimeError:  # its event loop is closed: nobody reads any more
            job.cancelled = True
