"""One program run by several processes, one or more per host: they meet, one of them prints, all end together.

Every process runs the same commands in the same order; arrays span the devices of all of them. A process that fails
leaves its reason with the coordinator, and the others, who would wait for it in a collective for ever, end with it. One
that is killed outright `jax.distributed` misses after 100 seconds, and then ends the others itself.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_REASON = "kimi-jax/failure"
_FAREWELL_S = 10  # the coordinator goes last: the others read the reason from it


@contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[bool]:
    """The processes meet before the body, which gets whether this is the one that prints.

    `jax.distributed` finds out from the environment (a TPU pod, GKE, Slurm, MPI) what is None here. Call it before
    anything asks JAX for devices. Where the body raises, in any process, every process writes the first such reason to
    standard error and exits with 1. Raises ValueError where neither flags nor environment say who the processes are.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes did not meet ({error}); on a TPU pod, GKE or Slurm the environment says who they are, "
            "elsewhere --coordinator HOST:PORT, --num-processes N and --process-id I do"
        ) from error
    from jax._src.distributed import global_state  # the only way to the coordinator's keys

    client: Any = global_state.client
    threading.Thread(target=_end_with_others, args=(client,), daemon=True).start()
    try:
        yield jax.process_index() == 0
    except BaseException as error:  # whatever it is, the others must not wait
        reason = f"process {jax.process_index()} of {jax.process_count()}: {_in_one_line(error)}"
        try:
            client.key_value_set(_REASON, reason)
        except jax.errors.JaxRuntimeError:  # another was first, or the coordinator is gone
            reason = client.key_value_try_get(_REASON)
        finally:
            _end(client, reason)
    jax.distributed.shutdown()


def _end_with_others(client: Any) -> None:
    """Waits for a reason to end, in a thread of its own."""
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
    _ending.acquire()  # for good: the watcher and the failing thread may both come here
    print(f"kimi-jax: {reason}", file=sys.stderr, flush=True)
    try:
        client.wait_at_barrier("kimi-jax/farewell", 1000 * _FAREWELL_S)
    finally:
        os._exit(1)  # a collective that waits in another thread would hold an ordinary exit up
