"""Reads the values of one JSON object by a method for each kind, within bounds, and names them in errors as the file
spells them."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from kimi_jax.printable import printable

MAX_TOKEN_IDS = 1_000  # in a list of ids that end a text; releases have up to two
_FLOAT32_MIN, _FLOAT32_MAX = 1.1754943508222875e-38, 3.4028234663852886e38
_NO_ALIASES: Mapping[str, str] = {}


class ConfigError(ValueError):
    """Is raised for a config.json that this package cannot honour; the message names the file and the field."""


class Fields:
    """The values of one JSON object. A null is read as a missing value.

    `where` begins every error. `aliases` maps other spellings of a name to the one asked for. Raises `ConfigError`
    where `values` is no object, and where two spellings of a name have different values.
    """

    def __init__(self, values: Any, where: str, aliases: Mapping[str, str] = _NO_ALIASES):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} is {shown(values)}, expected an object")
        self.where = where
        self._values: dict[str, Any] = {}
        self._spelling: dict[str, str] = {}
        self._known: set[str] = set()
        for spelling, value in values.items():
            self._take(aliases.get(spelling, spelling), spelling, value)

    def adopt(self, other: "Fields", aliases: Mapping[str, str]) -> None:
        """Copies values from another object; `aliases` maps its spellings to the names here. Raises `ConfigError` where
        a name has another value here."""
        for spelling, name in aliases.items():
            self._take(name, spelling, other.raw(spelling))

    def _take(self, name: str, spelling: str, value: Any) -> None:
        if value is None:
            return
        if name in self._values and not same(self._values[name], value):
            raise ConfigError(
                f"{self.where}: {self._spelling[name]} {shown(self._values[name])} and {printable(spelling)} "
                f"{shown(value)} contradict each other"
            )
        self._values.setdefault(name, value)
        self._spelling.setdefault(name, spelling)

    def has(self, name: str) -> bool:
        """Says whether `name` is given and not null."""
        self._known.add(name)
        return name in self._values

    def raw(self, name: str) -> Any:
        """Returns the value of `name` as it was parsed, None where it is missing."""
        self._known.add(name)
        return self._values.get(name)

    def named(self, name: str) -> str:
        """Returns the path of `name` for an error: file, objects and key as the file spells it."""
        return f"{self.where}: {self._spelling.get(name, name)}"

    def check(self, holds: bool, message: str) -> None:
        """Raises `ConfigError` with `message` where `holds` is false."""
        if not holds:
            raise ConfigError(f"{self.where}: {message}")

    def integer(self, name: str, default: int | None = None, *, least: int = 0, most: int) -> int:
        """Returns an integer between `least` and `most`. Raises `ConfigError` for an integer outside, for a bool or
        float, and for a missing value without `default`."""
        value = self._required(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected an integer")
        if name in self._values and not least <= value <= most:
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected {least} to {most}")
        return value

    def number(
        self, name: str, default: float | None = None, *, least: float = 0.0, above: bool = True, most: float = math.inf
    ) -> float:
        """Returns a finite number that float32 can hold, above `least` (with `above=False` also `least`), at most
        `most`. Accepts integers. Raises `ConfigError` for other values, and for a missing one without `default`."""
        value = self._required(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected a number")
        if value != 0 and not _FLOAT32_MIN <= abs(value) <= _FLOAT32_MAX:
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected a number that float32 holds")
        if not (value > least or (value == least and not above)) or value > most:
            limits = f"a number {'above' if above else 'from'} {least:g}"
            limits += "" if most == math.inf else f" to {most:g}"
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected {limits}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns true or false. Raises `ConfigError` for anything else, 0 and 1 too."""
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.named(name)} is {shown(value)}, expected true or false")
        return value

    def word(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        """Returns one of the strings `choices`. Raises `ConfigError` for any other value."""
        value = self._required(name, default)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{self.named(name)} {shown(value)} is none of {', '.join(choices)}")
        return value

    def words(self, name: str, choices: Collection[str], length: int) -> tuple[str, ...]:
        """Returns a list of `length` strings, each among `choices`. Raises `ConfigError` for any other value."""
        values = self._required(name, None)
        if not isinstance(values, list) or len(values) != length:
            found = f"a list of {len(values)}" if isinstance(values, list) else shown(values)
            raise ConfigError(f"{self.named(name)} is {found}, expected a list of {length}")
        for value in values:
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(f"{self.named(name)} has {shown(value)}, which is none of {', '.join(choices)}")
        return tuple(values)

    def integers(self, name: str, *, least: int, most: int, longest: int) -> tuple[int, ...]:
        """Returns a list of at most `longest` integers between `least` and `most`. Raises `ConfigError` for any other
        value."""
        values = self._required(name, None)
        if not isinstance(values, list):
            raise ConfigError(f"{self.named(name)} is {shown(values)}, expected a list")
        if len(values) > longest:
            raise ConfigError(f"{self.named(name)} has {len(values)} entries, expected at most {longest}")
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(f"{self.named(name)} has {shown(value)}, expected integers from {least} to {most}")
        return tuple(values)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Returns the token ids in `name`, one or a list, none where it is missing. Raises `ConfigError` for anything
        but ids within the vocabulary."""
        value = self.raw(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        self.check(
            len(ids) <= MAX_TOKEN_IDS, f"{name} has {len(ids)} entries, expected at most {MAX_TOKEN_IDS} token ids"
        )
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ConfigError(f"{self.named(name)} is {shown(value)}, expected a number or a list of numbers")
            self.check(0 <= token < vocab_size, f"{name} {shown(token)} is outside vocab_size {vocab_size}")
        return tuple(ids)

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """Returns a token id, None where it is missing. Raises `ConfigError` for anything but an id within the
        vocabulary."""
        self.check(not isinstance(self.raw(name), list), f"{name} is {shown(self.raw(name))}, expected one token id")
        return next(iter(self.token_ids(name, vocab_size)), None)

    def object(self, name: str, aliases: Mapping[str, str] = _NO_ALIASES) -> "Fields | None":
        """Returns the fields of the object in `name`, None where it is missing. Raises `ConfigError` for another
        kind of value."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.named(name), aliases)

    def only(self, name: str, *supported: Any) -> None:
        """Raises `ConfigError` where `name` is given and is not one of `supported`."""
        if self.has(name) and not any(same(self._values[name], value) for value in supported):
            expected = f"only {', '.join(map(shown, supported))}" if supported else "it has to be absent"
            raise ConfigError(f"{self.named(name)} {shown(self._values[name])} is not supported; {expected}")

    def neutral(self, table: Mapping[str, Collection[Any]]) -> None:
        """Marks the names of `table` as read where they have one of its values, which change nothing."""
        for name, values in table.items():
            if any(same(self._values.get(name), value) for value in values):
                self._known.add(name)

    def knows(self, name: str) -> bool:
        """Says whether `name` was read."""
        return name in self._known

    def unread(self, harmless: Collection[str] = ()) -> list[str]:
        """Returns the names in the file, as it spells them, that were not read and are not `harmless`. Names that begin
        with an underscore are left out: they are notes of the file's writer (a comment, the kernel transformers ran).
        """
        return [
            str(self._spelling[name])
            for name in self._values
            if not (name in self._known or name in harmless or str(name).startswith("_"))
        ]

    def nothing_else(self) -> None:
        """Raises `ConfigError` for a name that was not read."""
        for name in self.unread():
            raise ConfigError(f"{self.where}: {printable(name)} is not known, and may change the model")

    def _required(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise ConfigError(f"{self.named(name)} is missing")
        return default if value is None else value


def same(one: Any, other: Any) -> bool:
    """Says whether two JSON values are equal; true and 1 are not, 1 and 1.0 are."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def shown(value: Any) -> str:
    """Returns `value` as one short line for an error."""
    if isinstance(value, int) and value.bit_length() > 1_000:  # Python refuses to print integers without end
        return f"an integer of {value.bit_length()} bits"
    try:
        return printable(repr(value), 80)
    except (ValueError, RecursionError):  # a value made in Python that holds such integers, or itself
        return f"a {type(value).__name__}"
