"""Does many independent tasks with a few threads, within a bound on the memory that they hold together."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Task = TypeVar("Task")

MEMORY = 4 * 2**30
WORKERS = 4
_LEAST = 2**30
_RESERVED = 3 * 2**28  # of the memory: the interpreter, JAX and the names of 200,000 tensors take 600 MB


def limit(memory: int) -> int:
    """What tasks may hold together in a process that is to stay under `memory` bytes. Raises ValueError for too few."""
    if memory < _LEAST:
        raise ValueError(f"memory of {memory:,} bytes: expected {_LEAST:,} or more")
    return memory - _RESERVED


def run(
    tasks: Iterable[Task], work: Callable[[Task], None], nbytes: Callable[[Task], int], *, workers: int, limit: int
) -> None:
    """work(task) for all `tasks`, started in their order in `workers` threads; those at work never hold more than
    `limit` bytes, `nbytes` each (a larger one works alone).

    While one thread waits for a disk another computes, so reading, transforming and writing overlap. The first error
    stops the others at the end of their tasks and is raised, an interrupt too.
    """
    queue = iter(tasks)
    turn, room = threading.Lock(), threading.Condition()
    held = 0
    errors: list[BaseException] = []

    def next_task() -> tuple[Task, int] | None:
        nonlocal held
        with turn:  # whoever waits for room has the next task, so that none is overtaken
            task = next(queue, None)
            if task is None or errors:
                return None
            need = nbytes(task)
            with room:
                room.wait_for(lambda: held == 0 or held + need <= limit)
                held += need
            return task, need

    def loop() -> None:
        nonlocal held
        try:
            while (taken := next_task()) is not None:
                task, need = taken
                try:
                    work(task)
                finally:
                    with room:
                        held -= need
                        room.notify()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, name=f"worker-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # an interrupt gets through between two waits
    except BaseException as error:
        errors.append(error)
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
