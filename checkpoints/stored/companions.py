"""Companions: the files beside the tensors of a checkpoint that are copied along with them."""

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.files.place import Place, size
from checkpoints.published.safetensors import INDEX, CheckpointError
from checkpoints.stored.manifest import MANIFEST
from kimi_jax import json_reader
from kimi_jax.printable import printable

COMPANION_BYTES = 100 * 2**20  # of one file; the largest published one is a tokenizer of some 20 MB
# Configuration, tokenizer, preprocessor, templates and the code that comes with them.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*")
# Files that a checkpoint of either kind has of its own; stock zarr would take the last for its root's.
_NOT_COMPANIONS = (INDEX, MANIFEST, "zarr.json")


def is_companion(name: str) -> bool:
    """Returns whether a file of this name, beside the tensors of a checkpoint, is copied along with them."""
    return (
        "/" not in name
        and name not in _NOT_COMPANIONS
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPANIONS)
    )


def companion_digests(digests: Mapping[str, str] | None) -> dict[str, str] | None:
    """Returns the checksums of the companions among those of a manifest's `files`; None where it has none of files."""
    return None if digests is None else {name: sha256 for name, sha256 in digests.items() if is_companion(name)}


def find_companions(source: Place) -> dict[str, Place]:
    """Returns the files that the checkpoint in `source` has besides its tensors, by name.

    A link is followed within the folder, and in the cache of the Hugging Face Hub, where a snapshot is links, to the
    files of its own repository. Raises CheckpointError naming a link that leads elsewhere (its target may not be meant
    to be published), something that is no file (a FIFO, say), and a file of more than `COMPANION_BYTES`.
    """
    found = {
        file.name: file for pattern in _COMPANIONS for file in source.glob(pattern) if file.name not in _NOT_COMPANIONS
    }
    for name, file in sorted(found.items()):
        if file.is_dir():
            del found[name]
            continue
        if isinstance(file, Path):
            _check_link(source, file)
        if not file.is_file():
            raise CheckpointError(f"{printable(file)}: is no regular file, expected one; remove it")
        if (nbytes := size(file)) > COMPANION_BYTES:
            raise CheckpointError(f"{printable(file)}: has {nbytes:,} bytes, expected at most {COMPANION_BYTES:,}")
    return dict(sorted(found.items()))


def _check_link(folder: Place, file: Path) -> None:
    """Raises CheckpointError for a link out of `folder`, or to nothing."""
    if not file.is_symlink():
        return
    target, inside = Path(os.path.realpath(file)), Path(os.path.realpath(str(folder)))
    repository = inside.parents[1] if inside.parent.name == "snapshots" else None  # a cache of the Hub
    if not target.is_relative_to(inside) and not (repository and target.is_relative_to(repository / "blobs")):
        raise CheckpointError(
            f"{printable(file)}: is a link to {printable(target)}, outside of the folder; put a copy in its place"
        )
    if not target.exists():
        raise CheckpointError(f"{printable(file)}: is a link to {printable(target)}, which is not there")


def copy_companions(
    source: Place,
    folder: Path,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    expected: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Copies the files that the checkpoint in `source` has besides its tensors, config.json as `config` changes it;
    returns their names.

    Raises what `find_companions` raises, and CheckpointError naming a file whose SHA-256 is not that of `expected`, by
    name.
    """
    files = find_companions(source)
    if expected is not None and (names := sorted(files.keys() ^ expected.keys())):
        raise CheckpointError(f"{printable(source / names[0])}: changed: it {_came_or_went(names[0] in files)}")
    for name, file in files.items():
        data = file.read_bytes()
        if expected is not None and hashlib.sha256(data).hexdigest() != expected[name]:
            raise CheckpointError(f"{printable(file)}: changed: it is not the file that was converted")
        if config is not None and name == "config.json":
            values = config(json_reader.parse_object(data, str(file), error=CheckpointError))
            data = (json.dumps(values, indent=2) + "\n").encode()
        (folder / name).write_bytes(data)
    return tuple(files)


def _came_or_went(came: bool) -> str:
    return "was not there when the checkpoint was converted" if came else "was there when the checkpoint was converted"
