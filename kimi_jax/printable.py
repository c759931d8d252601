"""Makes text from files, requests and tensor names fit for one line of an error message or a terminal."""

import unicodedata

# Controls, format characters (bidirectional overrides among them), surrogates and line separators steer a terminal.
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(value: object, limit: int = 200) -> str:
    """Returns `str(value)` in about `limit` characters, cut in its middle, with steering ones escaped (`\\x1b`)."""
    text = str(value)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... ({len(text):,} characters) ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _STEERING else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
