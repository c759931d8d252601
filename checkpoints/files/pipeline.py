"""Runs many independent tasks in a few threads, within a bound on their memory, and counts the bytes that they did."""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Task = TypeVar("Task")
# A function that is called with the bytes that are done, those of earlier attempts included, and with their total.
Progress = Callable[[int, int], None]

MEMORY = 4 * 2**30
WORKERS = 4
_LEAST = 2**30
_RESERVED = 3 * 2**28  # of the memory: the interpreter, JAX and the names of 200,000 tensors take 600 MB


class ByteCounter:
    """Counts the bytes that several threads have done, from the `done` of earlier attempts on, and reports them."""

    def __init__(self, total: int, progress: Progress | None, done: int = 0):
        self.done, self.total, self.progress, self._lock = done, total, progress, threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(self.done, self.total)


def limit(memory: int) -> int:
    """Returns the memory that tasks may take together in a process that is to stay under `memory` bytes.

    Raises ValueError for less than a GiB.
    """
    if memory < _LEAST:
        raise ValueError(f"memory of {memory:,} bytes: expected {_LEAST:,} or more")
    return memory - _RESERVED


def run(
    tasks: Iterable[Task], work: Callable[[Task], None], nbytes: Callable[[Task], int], *, workers: int, limit: int
) -> None:
    """Calls work(task) for all `tasks`, started in their order in `workers` threads. Running tasks take at most `limit`
    bytes together, `nbytes(task)` each; a task that is larger runs alone.

    While one thread waits for a disk another computes, so reading, transforming and writing overlap. The first error,
    or an interrupt, is raised when the tasks that are running have ended; no others are begun.
    """
    queue = iter(tasks)
    turn, room = threading.Lock(), threading.Condition()
    taken = 0
    errors: list[BaseException] = []

    def next_task() -> tuple[Task, int] | None:
        nonlocal taken
        with turn:  # the thread that waits for room has the next task, so that none is overtaken
            task = next(queue, None)
            if task is None or errors:
                return None
            need = nbytes(task)
            with room:
                room.wait_for(lambda: taken == 0 or taken + need <= limit)
                taken += need
            return task, need

    def loop() -> None:
        nonlocal taken
        try:
            while (found := next_task()) is not None:
                task, need = found
                try:
                    work(task)
                finally:
                    with room:
                        taken -= need
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
