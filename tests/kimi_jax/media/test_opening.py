"""The places of pictures, the formats that are opened, and the errors for others."""

import base64
from pathlib import Path

import numpy as np
import pytest
from media_cases import data_url, encode, noise
from PIL import Image

from kimi_jax.media import from_message, open_image, open_video


def test_open_image(tmp_path: Path):
    image = Image.fromarray(noise(5, 4))
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, data_url(image)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), noise(5, 4))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("https://example.org/a.png", ValueError, "https://example.org/a.png: https:// is not fetched; download it"),
        ("no/such.png", FileNotFoundError, "no/such.png: no such file"),
        ("data:image/png,abc", ValueError, "data:image/png URL: cannot be read: it is not base64"),
        ("data:image/png;base64,a*b", ValueError, "data:image/png;base64 URL: cannot be read"),
        ("data:image/png;base64,AAAA", ValueError, "data:image/png;base64 URL: not an image that can be read"),
    ],
)
def test_no_image(source: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_text_and_truncated_files_are_no_images(tmp_path: Path, kind: str):
    file = tmp_path / "a.png"
    file.write_text("I am no image")
    with pytest.raises(ValueError, match=r"a.png: not an image that can be read \(found 13 other bytes"):
        open_image(file)
    Image.fromarray(noise(64, 64)).save(file, kind)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"a.png: a damaged image"):
        open_image(file)


@pytest.mark.parametrize("change", ["line breaks", "capitals", "percent"])
def test_data_urls_as_people_write_them(change: str):
    url = data_url(Image.fromarray(noise(9, 9)))
    if change == "line breaks":
        header, body = url.split(",")
        url = f"{header},\n" + "\r\n".join(body[i : i + 76] for i in range(0, len(body), 76)) + "\n"
    elif change == "capitals":
        url = url.replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64")
    else:
        url = url.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D").replace("image%2F", "image/")
    np.testing.assert_array_equal(np.asarray(open_image(url)), noise(9, 9))


def test_bytes_and_arrays_are_taken():
    grey = np.repeat(noise(5, 4)[..., :1], 3, axis=-1)
    assert open_image(encode(Image.fromarray(noise(5, 4)))).size == (5, 4)
    assert open_image(bytearray(encode(Image.fromarray(noise(5, 4))))).size == (5, 4)
    np.testing.assert_array_equal(np.asarray(open_image(grey[..., 0])), grey)
    np.testing.assert_array_equal(np.asarray(open_image(noise(5, 4))), noise(5, 4))
    assert np.asarray(open_image(np.zeros((1, 1, 4), np.uint8))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "given as int, expected a data: URL, a path, bytes, a uint8 array or a PIL image"),
        (None, "given as NoneType"),
        (b"", "the bytes given: not an image that can be read"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\] is no picture, expected uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\] is no picture"),
        (np.zeros((0, 4), np.uint8), "4 x 0 pixels has nothing in it"),
        ("FILE:///etc/passwd", r"file:// is not fetched; give its path"),
        ("ms://abc", "ms:// is not fetched"),
        ("ftp://x/\x1b[31my", r"ftp://x/\\x1b\[31my: ftp:// is not fetched"),
        ("/dev/zero", "/dev/zero: not a regular file"),
        ("/", "/: not a regular file"),
        ("a" * 5000, r"a{100} \.\.\. \(5,000 characters\) .*: File name too long"),
    ],
)
def test_what_is_no_picture_is_named_in_a_line(source: object, message: str):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_image(source)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_only_named_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Given a host with a Ghostscript that leaves a trace
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for data, found in [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "PostScript"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
        (encode(Image.new("RGB", (4, 4)), "PDF"), "PDF"),
        (encode(Image.new("RGB", (4, 4)), "PPM"), "59 other bytes"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    ]:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        with pytest.raises(ValueError, match=f"found {found}, expected PNG, JPEG, WEBP, GIF or BMP"):
            open_image(url)
        with pytest.raises(ValueError, match=f"found {found}, expected"):
            open_video(url)
    assert not (tmp_path / "ran").exists()


# --- files that messages name -----------------------------------------------------------------------------------------


def test_a_message_names_files_of_one_folder(tmp_path: Path):
    allowed, secret = tmp_path / "allowed", tmp_path / "secret.png"
    (allowed / "sub").mkdir(parents=True)
    for path in (secret, allowed / "a.png", allowed / "sub" / "b.png"):
        Image.fromarray(noise(5, 4)).save(path)
    (allowed / "link.png").symlink_to(secret)
    (allowed / "near.png").symlink_to("sub/b.png")
    for name in ("a.png", str(allowed / "a.png"), "sub/../a.png", "sub/b.png", "near.png"):
        assert open_image(from_message(name, allowed)).size == (5, 4)
    for name in ("../secret.png", str(secret), "link.png", "sub/../../secret.png", "../allowed2/x", "/etc/passwd"):
        with pytest.raises(ValueError, match=r"outside .*allowed, the folder whose files the messages may name"):
            from_message(name, allowed)
    assert [path.name for path in from_message(["a.png", "sub/b.png"], allowed)] == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "loop"])
def test_names_that_are_no_path(tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, OSError)) as caught:
        open_image(from_message(name, tmp_path))
    assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)


def test_without_a_folder_a_message_names_no_file_and_learns_nothing(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"")
    for name in (str(tmp_path / "a.png"), str(tmp_path / "none.png")):
        with pytest.raises(ValueError, match="a message may not name local files here; expected a data: URL"):
            from_message(name, None)
    with pytest.raises(ValueError, match="file:// is not fetched"):
        from_message(f"file://{tmp_path}/a.png", tmp_path)
    for own in (tmp_path / "a.png", b"bytes", noise(2, 2), "Data:image/png;base64,", None, 5):
        assert from_message(own, None) is own
