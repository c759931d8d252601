"""Recognises by its first bytes a file of another kind than expected.

Failed or unfinished downloads leave such files; others have a format that is not read here.
"""

HEAD = 512  # bytes that `mistaken` needs; the longest magic below has 23, after white space

_DOWNLOAD = "download the file again"
_CONVERT = "only safetensors are read; download those, or convert it"
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"),
    (b"<!doctype html", f"a web page (HTML); {_DOWNLOAD}, logged in where that is asked for"),
    (b"<html", f"a web page (HTML); {_DOWNLOAD}, logged in where that is asked for"),
    (b"<?xml", f"an XML document, as servers send with an error; {_DOWNLOAD}"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
    (b"pk\x03\x04", f"a zip archive, which PyTorch's .bin and .pt files are; {_CONVERT}"),
    (b"\x80\x02", f"a Python pickle, which old PyTorch .bin files are; {_CONVERT}"),
    (b"\x80\x04", f"a Python pickle; {_CONVERT}"),
    (b"\x80\x05", f"a Python pickle; {_CONVERT}"),
    (b"gguf", f"in GGUF, llama.cpp's format; {_CONVERT}"),
)


def mistaken(head: bytes) -> str | None:
    """Recognises a file that begins with `head`, its first `HEAD` bytes or the whole of a shorter file. Returns its
    kind and the remedy as the rest of a sentence "FILE is ...", None for an unknown kind."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return f"zeros where it begins, as unfinished downloads are; {_DOWNLOAD}"
    start = head.lstrip().removeprefix(b"\xef\xbb\xbf").lower()
    return next((kind for magic, kind in _KINDS if start.startswith(magic)), None)
