"""Runs one program in several processes, one or more per host: they connect, one of them prints, all end together.

Every process runs the same commands in the same order; arrays span the devices of all of them. A process that fails
writes its reason to the coordinator's store, and the other processes, which would wait for it in a collective for ever,
read it there and end too. `jax.distributed` notices a killed process after 100 seconds, and then ends the others.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_REASON = "kimi-jax/failure"
_FAREWELL_S = 10  # the longest wait at the end; the coordinator ends last, since the others read the reason from it


@contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[bool]:
    """Connects the processes before the body, and yields whether this process is the one that prints.

    `jax.distributed` reads an argument that is None from the environment (a TPU pod, GKE, Slurm, MPI). Enter this
    context before anything asks JAX for devices. Where the body raises, in any process, every process writes the first
    such reason to standard error and exits with 1. Raises ValueError where neither arguments nor environment say who
    the processes are.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes did not meet ({error}); on a TPU pod, GKE or Slurm the environment says who they are, "
            "elsewhere --coordinator HOST:PORT, --num-processes N and --process-id I do"
        ) from error
    from jax._src.distributed import global_state  # no public function of JAX gives the coordinator's store

    client: Any = global_state.client
    threading.Thread(target=_end_with_others, args=(client,), daemon=True).start()
    try:
        yield jax.process_index() == 0
    except BaseException as error:  # of any kind: the other processes must not wait
        reason = f"process {jax.process_index()} of {jax.process_count()}: {_in_one_line(error)}"
        try:
            client.key_value_set(_REASON, reason)
        except jax.errors.JaxRuntimeError:  # another process was first, or the coordinator is gone
            reason = client.key_value_try_get(_REASON)
        finally:
            _end(client, reason)
    jax.distributed.shutdown()


def _end_with_others(client: Any) -> None:
    """Waits in a thread of its own until a process has failed, then ends this process too."""
    while True:
        try:
            reason = client.blocking_key_value_get(_REASON, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # the job is over
        else:
            _end(client, reason)


_ending = threading.Lock()


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _end(client: Any, reason: str) -> None:
    _ending.acquire()  # never released: the watching thread and the failing one may both come here
    print(f"kimi-jax: {reason}", file=sys.stderr, flush=True)
    try:
        client.wait_at_barrier("kimi-jax/farewell", 1000 * _FAREWELL_S)
    finally:
        os._exit(1)  # an ordinary exit would wait for a collective in another thread
