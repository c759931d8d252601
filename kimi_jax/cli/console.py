"""The console that commands print tables and notes on."""

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets BrokenPipeError pass, which `main` handles, where rich would end the process with exit code 1."""
        raise


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console for standard output or error; markup is interpreted, so names of strangers must be escaped."""
    return _Console(stderr=stderr, quiet=quiet, highlight=not stderr)
