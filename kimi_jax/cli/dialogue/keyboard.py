"""Reads lines that a person types, with a history in the user's state folder, or lines of a file or pipe."""

import os
import sys
from pathlib import Path

HISTORY = 1_000  # lines that are kept


def state_folder() -> Path:
    """Returns the folder for this user's history: `XDG_STATE_HOME` or ~/.local/state, and `kimi-jax` in it."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kimi-jax"


class Keyboard:
    """Reads lines from standard input. Where that and standard output are terminals, lines can be edited, and those of
    earlier chats are found again in the file `history`."""

    def __init__(self, history: Path):
        self.is_terminal = sys.stdin.isatty()
        self._readline = None
        if self.is_terminal and sys.stdout.isatty():
            import readline

            self._readline, self._history = readline, history
            if history.is_file():
                readline.read_history_file(history)
            readline.set_history_length(HISTORY)

    def read(self, prompt: str) -> str | None:
        """Returns the next line without its end, None after the last. A pipe gets no prompt.

        Raises KeyboardInterrupt where Ctrl-C is typed.
        """
        try:
            if self._readline is not None:
                return input(prompt)
            if self.is_terminal:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except EOFError:
            return None
        return line.rstrip("\n") if line else None

    def save(self) -> None:
        """Writes the history, for its owner's eyes alone. Raises OSError where that cannot be done."""
        if self._readline is None:
            return
        self._history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._history, os.O_WRONLY | os.O_CREAT, 0o600))
        self._readline.write_history_file(self._history)
