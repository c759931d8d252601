"""Checkpoints of a run: Orbax, a leaf for each parameter, the newest few kept; one that is not whole is never found."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kimi_jax.config import KimiConfig
from kimi_jax.printable import printable
from kimi_jax.training.step import TrainState

_KEEP = 3


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
        call."""
        arrays = ocp.args.StandardSave(_by_name(state))
        self._manager.save(step, args=ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(self.settings)))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Returns the state after `step` steps, or the newest, with the shapes, dtypes and shardings of `like`.

        Raises FileNotFoundError where there is no checkpoint, and ValueError where it is of another model or of other
        settings.
        """
        step = self.latest if step is None else step
        if step is None:
            raise FileNotFoundError(f"{printable(self.folder)}: has no checkpoint to go on from")
        where = f"{printable(self.folder)}: checkpoint {step}"
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        for name, value in self.settings.items():
            if (found := meta.get(name)) != value:
                raise ValueError(f"{where} was saved with {name} {found!r}, this run has {value!r}")
        arrays = _by_name(like)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
        # (in the order of `arrays`: a dict that passed through `jax.tree` is sorted)
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in arrays])

    def wait(self) -> None:
        """Waits until what was saved is on disk, and raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the manager's threads."""
        self._manager.close()


def _by_name(state: TrainState) -> dict[str, Any]:
    """Returns a state's arrays by name, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
