"""Makes text from files, requests and tensor names fit for one line of an error message or a terminal."""


def printable(value: object, limit: int = 200) -> str:
    """Returns `str(value)` in about `limit` characters, cut in its middle, with all escaped (`\\x1b`) that Python calls
    unprintable: controls, format characters (bidirectional overrides among them), surrogates, line separators, code
    points that stand for nothing."""
    text = str(value)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... ({len(text):,} characters) ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
