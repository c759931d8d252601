"""Reads the bytes of a picture from a file, a `data:` URL or memory, and decides which files a message may name."""

import base64
import binascii
import mimetypes
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from kimi_jax.bounded_read import read_at_most
from kimi_jax.media.limits import MAX_BYTES
from kimi_jax.printable import printable

_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SOURCES = "a data: URL, a path, bytes, a uint8 array or a PIL image"


class NamedBytes(bytes):
    """Holds the bytes of a picture under the name that errors give it."""

    name: str

    def __new__(cls, data: bytes, name: str) -> "NamedBytes":
        made = super().__new__(cls, data)
        made.name = name
        return made


def from_message(source: object, folder: Path | None) -> object:
    """Returns the `source` of a message's image or video as `read` takes it.

    Messages often come from strangers, and a message that came as JSON has strings only. A string that is no `data:`
    URL must be a path within `folder` once symbolic links are resolved; None allows no files at all. The program itself
    put every other object there (a Path too), and it is returned unchanged. Raises ValueError for a forbidden path,
    without looking whether the file exists.
    """
    if isinstance(source, list | tuple):
        return [from_message(one, folder) for one in source]
    if not isinstance(source, str) or _is_data_url(source):
        return source
    name = printable(source, 80)
    _refuse_scheme(source, paths=folder is not None)
    if folder is None:
        raise ValueError(f"{name}: a message may not name local files here; expected a data: URL")
    try:
        root = folder.resolve(strict=True)
        path = (root / source).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name}: not a path: {printable(reason)}") from None
    if not path.is_relative_to(root):
        raise ValueError(f"{name}: outside {printable(folder)}, the folder whose files the messages may name")
    return path


def read(source: object) -> tuple[bytes, str]:
    """Returns the bytes of a path, a base64 `data:` URL or a bytes object, and their name for errors.

    Raises FileNotFoundError, another OSError or ValueError naming the source. Other URLs are refused: this package
    fetches nothing.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), source.name if isinstance(source, NamedBytes) else "the bytes given"
    elif isinstance(source, str) and _is_data_url(source):
        data, name = _from_data_url(source)
    elif isinstance(source, str | Path):
        if isinstance(source, str):
            _refuse_scheme(source, paths=True)
        data, name = _from_file(Path(source)), printable(source)
    else:
        raise ValueError(f"a picture is given as {type(source).__name__}, expected {_SOURCES}")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: more than {MAX_BYTES:,} bytes")
    return data, name


def is_folder(source: object) -> bool:
    """Says whether `source` is the path of a folder."""
    if not isinstance(source, str | Path) or (isinstance(source, str) and _is_data_url(source)):
        return False
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # the string cannot be a path
        return False


def as_data_url(path: Path) -> str:
    """Returns the file of a picture as a base64 `data:` URL. Raises what `read` raises."""
    data, _ = read(path)
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _refuse_scheme(text: str, *, paths: bool) -> None:
    """Raises ValueError for a URL, with advice: to give a path only where `paths` are taken."""
    if (scheme := _SCHEME.match(text)) is not None:
        kind = scheme[1].lower()
        advice = "give its path" if kind == "file" else "download it and give its path or a data: URL"
        if not paths:
            advice = "expected a data: URL"
        raise ValueError(f"{printable(text)}: {kind}:// is not fetched; {advice}")


def _from_data_url(text: str) -> tuple[bytes, str]:
    header, comma, body = text.partition(",")
    name = f"{printable(header, 60)} URL"
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError(f"{name}: cannot be read: it is not base64")
    if len(body) > 2 * MAX_BYTES:  # 4 characters for 3 bytes, and line breaks
        raise ValueError(f"{name}: more than {MAX_BYTES:,} bytes")
    try:
        encoded = unquote_to_bytes(body) if "%" in body else body.encode("ascii")
        return base64.b64decode(b"".join(encoded.split()), validate=True), name
    except (binascii.Error, UnicodeError) as error:
        reason = error if isinstance(error, binascii.Error) else "it is not base64"
        raise ValueError(f"{name}: cannot be read: {printable(reason)}") from None


def _from_file(path: Path) -> bytes:
    name = printable(path)
    try:
        if path.is_file():
            with path.open("rb") as file:
                return read_at_most(file, MAX_BYTES)
        if path.exists():
            raise ValueError(f"{name}: not a regular file")
    except OSError as error:
        raise type(error)(f"{name}: {error.strerror}") from None
    raise FileNotFoundError(f"{name}: no such file")
