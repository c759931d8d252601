"""Checkpoints of a run: Orbax, a leaf for each parameter, the newest few kept; one that is not whole is never found."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kimi_jax.config import KimiConfig
from kimi_jax.printable import printable
from kimi_jax.training.step import TrainState

_KEEP = 3
# TensorStore's errors have the operating system's number in their text alone.
_NUMBER = re.compile(r"os_error_code='(\d+)'")


class Checkpoints:
    """Saves and restores the states of one run in `folder`, which is made where it is not there.

    `settings` are what a run must have in common with the one that it continues (JSON), by name.
    """

    def __init__(self, folder: str | Path, config: KimiConfig, settings: dict[str, Any], *, keep: int = _KEEP):
        self.folder = Path(folder).absolute()
        self.settings = {"model": hashlib.sha256(repr(config).encode()).hexdigest()[:16], **settings}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The steps done at the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Saves a state after `step` steps. Writing goes on in the background; an error of it is raised by the next
        call, as an OSError that names the folder, and the newest checkpoint, which stays."""
        arrays = ocp.args.StandardSave(_by_name(state))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(self.settings)))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Returns the state after `step` steps, or the newest, with the shapes, dtypes and shardings of `like`.

        Raises FileNotFoundError where there is no checkpoint, and ValueError where it is of another model or of other
        settings, or other parameters are trained.
        """
        step = self.latest if step is None else step
        if step is None:
            raise FileNotFoundError(f"{printable(self.folder)}: has no checkpoint to go on from")
        where = f"{printable(self.folder)}: checkpoint {step}"
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        for name, value in self.settings.items():
            if (saved := meta.get(name)) != value:
                raise ValueError(f"{where} was saved with {name} {saved!r}, this run has {value!r}")
        arrays = _by_name(like)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))
        except ValueError as error:  # of several lines, with every name that differs
            raise ValueError(f"{where} is of other parameters than this run trains: {_one_line(error)}") from error
        state = found["state"]
        # (in the order of `arrays`: a dict that passed through `jax.tree` is sorted)
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in arrays])

    def wait(self) -> None:
        """Waits until what was saved is on disk, and raises what went wrong."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the manager's threads."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises what goes wrong with a checkpoint in words; it is left under a name that is no checkpoint's."""
        try:
            yield
        except Exception as error:
            number = _NUMBER.search(str(error))
            reason = os.strerror(int(number[1])) if number else _one_line(error)
            newest = "there is no other" if self.latest is None else f"{self.latest} is the newest"
            raise OSError(f"{printable(self.folder)}: a checkpoint was not saved, {newest}: {reason}") from error


def _by_name(state: TrainState) -> dict[str, Any]:
    """Returns a state's arrays by name, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))
