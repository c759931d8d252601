"""Many tasks, a few threads, a bound on what they hold; files past the cache."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from checkpoints.files import pipeline, place, writing


@pytest.mark.parametrize("limit", [10, 25, 1000])
def test_all_jobs_once_within_the_limit(limit: int) -> None:
    tasks = [3, 9, 1, 40, 2, 8, 8, 8, 5, 1, 10] * 5
    lock, held, most, done = threading.Lock(), 0, 0, []

    def work(task: int) -> None:
        nonlocal held, most
        with lock:
            held += task
            # one that is larger than the limit has it all to itself
            assert held <= limit or held == task
            most = max(most, held)
        time.sleep(0.001)
        with lock:
            held -= task
            done.append(task)

    pipeline.run(tasks, work, lambda task: task, workers=4, limit=limit)
    assert sorted(done) == sorted(tasks) and held == 0
    assert most > 15  # more than one at a time


def test_jobs_overlap() -> None:
    barrier = threading.Barrier(3, timeout=10)
    pipeline.run(range(6), lambda task: barrier.wait(), lambda task: 1, workers=3, limit=3)


def test_the_first_error_stops_the_rest() -> None:
    begun = []

    def work(task: int) -> None:
        begun.append(task)
        if task == 5:
            raise OSError("five")

    with pytest.raises(OSError, match="five"):
        pipeline.run(range(1000), work, lambda task: 1, workers=2, limit=100)
    assert len(begun) < 20


@pytest.mark.parametrize("size", [0, 1, 4096, 2**18 - 1, 2**18, 2**18 + 4097, 3 * 2**20 + 5])
@pytest.mark.parametrize("offset", [0, 8])
def test_files_have_the_bytes(tmp_path: Path, size: int, offset: int) -> None:
    data = place.aligned_bytes(size + 8)
    data[:] = np.arange(size + 8) % 251
    data = data[offset : offset + size]
    tail = np.arange(100, dtype=np.uint8)
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)
    writing.write_file(tmp_path / "file", [data, tail, tail])
    assert (tmp_path / "file").read_bytes() == data.tobytes() + 2 * tail.tobytes()
