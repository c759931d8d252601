"""Loads the checkpoint `argv[1]` on the mesh `argv[3]` as process `argv[2]` of two with four devices each, connected at
port `argv[4]`. Prints a JSON line: bytes read by leaf, bytes the process read in all, peak memory in bytes before and
after, bytes of its shards, and the SHA-256 of each shard by path and place.
"""

import hashlib
import json
import resource
import sys
from collections import Counter
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from checkpoints import load  # noqa: E402
from checkpoints.files.place import read_into  # noqa: E402
from checkpoints.stored import source as source_module  # noqa: E402
from sharding import make_mesh  # noqa: E402


def main(folder: str, process: int, shape: str, port: str, *, digests: bool = True) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    by_leaf: Counter[str] = Counter()

    def counting(file: Path, offset: int, into: memoryview) -> int:
        by_leaf[file.parent.name] += len(into)
        return read_into(file, offset, into)

    source_module.read_into = counting
    mesh = make_mesh(shape)
    peak, read = _peak(), _read()
    model = load(folder, mesh)
    read, resident, shards = _read() - read, 0, {}
    peak_after = _peak()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = variable.get_value()
        for shard in array.addressable_shards:
            resident += shard.data.size * (4 if array.dtype == "int4" else 8 * array.dtype.itemsize) // 8
            if digests:
                data = np.asarray(shard.data)
                data = data.astype(np.int8) if array.dtype == "int4" else data
                place = str(tuple(part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)))
                shards[f"{path} {place}"] = hashlib.sha256(np.ascontiguousarray(data).view(np.uint8)).hexdigest()
    line = {"by_leaf": by_leaf, "read": read, "peak": [peak, peak_after], "resident": resident, "shards": shards}
    print(json.dumps(line), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read() -> int:
    """Returns the bytes that the process has read by system calls, from the page cache or from the disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:2], int(sys.argv[2]), *sys.argv[3:5], digests="--no-digests" not in sys.argv)
