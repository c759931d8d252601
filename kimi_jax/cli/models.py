"""Finds the model that a command is given: a folder, a URL, or the short name of one that ships in the package."""

import difflib
from pathlib import Path

from kimi_jax.printable import printable

PROMPT_LOOKUP = "prompt-lookup"  # where the folder of a draft head may be named
SMALL = "k25-digits"  # the small trained Kimi that one talks to where no other is named


def small_model(name: str) -> Path:
    """Returns the folder of the small trained model `name`, of which a part will do: "digits" for "k25-digits".

    Raises ValueError, with the nearest name, where there is none or more than one.
    """
    from kimi_jax import small

    found = [full for full in small.NAMES if name in (full, *full.split("-"))]
    if len(found) != 1:
        raise ValueError(f"small model {printable(name, 60)!r}: {nearest(name, small.NAMES)}")
    return small.path(found[0])


def check_folder(path: Path | str) -> None:
    """Raises FileNotFoundError where a checkpoint's folder on this machine is not there. (A URL is not looked at.)

    Commands call it before they import anything that takes long.
    """
    if isinstance(path, Path) and not path.is_dir():
        raise FileNotFoundError(f"{printable(path)}: no such folder")


def check_draft(draft: Path | str | None) -> None:
    """Raises FileNotFoundError where a draft head's folder on this machine is not there."""
    if isinstance(draft, Path) and not draft.is_dir():
        raise FileNotFoundError(f"--draft {printable(draft)}: no such folder; expected a head's, or {PROMPT_LOOKUP}")


def nearest(name: str, names: "tuple[str, ...] | list[str]") -> str:
    """Returns the end of an error about an unknown name: the one that was probably meant, and all there are."""
    close = difflib.get_close_matches(name, names, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}There are {', '.join(names)}" if meant else f"there are {', '.join(names)}"
