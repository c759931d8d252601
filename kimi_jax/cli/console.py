"""Makes the consoles on which commands print tables and notes."""

from typing import Any

from rich.console import Console


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as rich does, but breaks lines only for a terminal; a table is as wide as elsewhere."""
        super().print(*objects, **({} if self.is_terminal else {"soft_wrap": True}) | options)

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, which `main` handles; rich's own method ends the process with exit code 1."""
        raise


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console for standard output or error. It interprets markup, so names of strangers must be escaped."""
    return _Console(stderr=stderr, quiet=quiet, highlight=not stderr)
