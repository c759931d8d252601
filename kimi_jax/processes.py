"""Runs one program in several processes, one or more per host: they connect, one of them prints, all end together.

Every process runs the same commands in the same order; arrays span the devices of all of them. A process that fails
writes its reason to the coordinator's store, and the other processes, which would wait for it in a collective for ever,
read it there and end too. A process that is killed, or whose host is gone, is missed by `links` within seconds, and
ends the others with its number and host. (`jax.distributed` itself would notice after 100 seconds, and ends a process
by SIGABRT where process 0 is the one that is gone: then this module's line comes beside JAX's own.)
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from kimi_jax.links import SILENCE_S, Links

_REASON = "kimi-jax/failure"
_LONGEST_MS = 2**31 - 1  # of a wait at a barrier: 24 days
_FAREWELL_S = 10  # the longest wait at the end; the coordinator ends last, since the others read the reason from it
_FAREWELL_AFTER_LOSS_S = 3  # and all end within 10 s, of which `links` may take SILENCE_S
_GRACE_S = 1.5  # a collective can fail before `links` says that its cause is a lost process


@contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    on_failure: Callable[[str], Any] | None = None,
) -> Iterator[Links]:
    """Connects the processes before the body, and yields this process's links with the others; the first one prints.

    `jax.distributed` reads an argument that is None from the environment (a TPU pod, GKE, Slurm, MPI). Enter this
    context before anything asks JAX for devices. Where the body raises, in any process, or a process is lost, every
    process writes the first such reason to standard error and exits with 1; before it exits it calls `on_failure` with
    the reason, in any thread, which should take no more than a second. Raises ValueError where neither arguments nor
    environment say who the processes are.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes did not meet ({error}); on a TPU pod, GKE or Slurm the environment says who they are, "
            "elsewhere --coordinator HOST:PORT, --num-processes N and --process-id I do"
        ) from error
    from jax._src.distributed import global_state  # no public function of JAX gives the coordinator's store

    end = _End(global_state.client, jax.process_index(), jax.process_count(), on_failure)
    threading.Thread(target=end.with_others, daemon=True).start()
    try:
        host = str(global_state.coordinator_address).rpartition(":")[0]
        links = Links(end.store, end.process, end.processes, host)
        links.watch(lambda lost: end.after_loss(lost, links.name(lost)))
        yield links
        end.done()
    except BaseException as error:  # of any kind: the other processes must not wait
        end.after_failure(error)
    jax.distributed.shutdown()
    links.close()


class _End:
    """Ends this process, once, with the first reason that any process has. `store` is the coordinator's."""

    def __init__(self, store: Any, process: int, processes: int, on_failure: Callable[[str], Any] | None = None):
        self.store, self.process, self.processes, self.on_failure = store, process, processes, on_failure
        self.lost: set[int] = set()
        self._ending = threading.Lock()
        self._waiting, self._all_done = threading.Event(), threading.Event()

    def done(self) -> None:
        """Waits until the body has ended well in every process: until then another's failure ends this one too."""
        self._waiting.set()
        self.store.wait_at_barrier("kimi-jax/done", _LONGEST_MS)
        self._all_done.set()

    def with_others(self) -> None:
        """Waits in a thread of its own until a process has failed, then ends this process too."""
        while True:
            try:
                found = json.loads(self.store.blocking_key_value_get(_REASON, 60_000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # the job is over, or process 0 is lost
            else:
                self._end(found["reason"], found["lost"])

    def after_failure(self, error: BaseException) -> None:
        """Ends this process, and so the others, because its body raised."""
        reason = f"process {self.process} of {self.processes}: {' '.join(str(error).split()) or type(error).__name__}"
        if isinstance(error, RuntimeError):  # perhaps of a collective, because another process is lost
            time.sleep(_GRACE_S)  # meanwhile another thread ends this process, if so
        self._publish(reason, None)

    def after_loss(self, lost: int, name: str) -> None:
        """Ends this process, and so the others, because a process is lost; not where all have done their work."""
        if self._waiting.is_set() and self._all_done.wait(1):
            return
        self._publish(f"{name} is lost: it was killed, or gave no sign of life for {SILENCE_S:g} s", lost)

    def _publish(self, reason: str, lost: int | None) -> None:
        """Ends with the reason, or with the one that another process was first to write."""
        if lost != 0:  # (the store is in process 0)
            try:
                self.store.key_value_set(_REASON, json.dumps({"reason": reason, "lost": lost}))
            except jax.errors.JaxRuntimeError:  # another process was first, or the coordinator is gone
                try:
                    found = json.loads(self.store.key_value_try_get(_REASON))
                    reason, lost = found["reason"], found["lost"]
                except jax.errors.JaxRuntimeError:
                    lost = 0
        self._end(reason, lost)

    def _end(self, reason: str, lost: int | None) -> None:
        self._ending.acquire()  # never released: several threads may come here
        print(f"kimi-jax: {reason}", file=sys.stderr, flush=True)
        wait = _FAREWELL_S if lost is None else _FAREWELL_AFTER_LOSS_S
        others = [process for process in range(self.processes) if process != lost]
        try:
            if self.on_failure is not None:
                self.on_failure(reason)
            if lost != 0:
                self.store.wait_at_barrier("kimi-jax/farewell", 1000 * wait, others)
        finally:
            os._exit(1)  # an ordinary exit would wait for a collective in another thread
