"""The tokenizer against the published one's vectors, and its limits and errors on the synthetic files."""

import base64
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_jax.text import StreamDecoder, Tokenizer, tokenizer
from kimi_jax.text.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


def test_published_vectors(real_tokenizer_dir: Path):
    real = Tokenizer.from_folder(real_tokenizer_dir)
    cases = json.loads((real_tokenizer_dir / "vectors.json").read_text(encoding="utf-8"))["text"]
    assert len(cases) >= 13
    for case in cases:
        assert real.encode(case["text"]) == case["ids"], case["text"]
        assert real.decode(case["ids"]) == case["text"]
    assert (real.vocab_size, real.bos_id, real.eos_id, real.pad_id) == (163840, 163584, 163585, 163839)
    assert real.special_tokens["<|media_pad|>"] == 163605
    assert real.special_tokens["<|reserved_token_163589|>"] == 163589


def test_tiny_layout_has_the_published_offsets(tok: Tokenizer):
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (768, 512, 513, 767)
    named = {"<|im_end|>": 514, "<|im_middle|>": 529, "<|media_pad|>": 533, "</think>": 535, "[UNK]": 766}
    assert {name: tok.special_tokens[name] for name in named} == named
    assert tok.special_tokens["<|reserved_token_517|>"] == 517
    assert sorted(tok.special_tokens.values()) == list(range(512, 768))


def test_tiny_offsets_are_those_of_the_real_file(tok: Tokenizer, real_tokenizer_dir: Path):
    real = Tokenizer.from_folder(real_tokenizer_dir)
    offsets = {name: i - 163584 for name, i in real.special_tokens.items() if "reserved" not in name}
    assert {name: i - 512 for name, i in tok.special_tokens.items() if "reserved" not in name} == offsets


def test_tiny_is_the_same_each_time_and_merges(tok: Tokenizer, tiny_tokenizer_dir: Path, tmp_path: Path):
    write_tiny_tokenizer(tmp_path / "again")
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_tokenizer_dir / name).read_bytes()
    assert len(tok.encode(" the question")) == 2


@pytest.mark.parametrize("base", [256, 700, 20_000])
def test_a_tokenizer_of_any_size_is_whole(base: int, tmp_path: Path):
    write_tiny_tokenizer(tmp_path, base_ranks=base)
    tok = Tokenizer.from_folder(tmp_path)
    assert tok.vocab_size == base + 256 and tok.special_tokens["<|im_end|>"] == base + 2
    text = "What is the weather in 北京?"
    assert tok.decode(tok.encode(text)) == text
    with pytest.raises(ValueError, match="255 base ranks, expected 256 or more"):
        write_tiny_tokenizer(tmp_path, base_ranks=255)


def _ranks(*more: bytes) -> str:
    tokens = [bytes([b]) for b in range(256)] + list(more)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


@pytest.mark.parametrize(
    ("text", "merges", "ids"),
    [
        # only `&&[^\p{Han}]` ends a Latin word before Han
        ("a好", (b"\xe5\xa5", "好".encode(), "a好".encode()), [97, 257]),
        ("aé", (b"\xc3\xa9", "aé".encode()), [257]),
        ("1234", (b"12", b"34", b"123", b"1234"), [258, 52]),
        ("I'm", (b"'m", b"I'm"), [257]),
        ("a.b", (b".b", b"a.b", b"a."), [97, 256]),
    ],
)
def test_pattern_bounds_what_may_merge(text: str, merges: tuple[bytes, ...], ids: list[int], tmp_path: Path):
    (tmp_path / "tiktoken.model").write_text(_ranks(*merges))
    reserved = f"<|reserved_token_{256 + len(merges)}|>"
    config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), reserved)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).encode(text) == ids


@pytest.mark.parametrize("text", ["<|im_end|>", "a<think>b</think>[EOS]", "<|reserved_token_600|>"])
def test_special_tokens_are_ids_only_where_allowed(tok: Tokenizer, text: str):
    assert any(i >= 512 for i in tok.encode(text))
    assert all(i < 512 for i in tok.encode(text, allow_special=False))
    assert tok.decode(tok.encode(text)) == tok.decode(tok.encode(text, allow_special=False)) == text


def test_long_runs_and_long_texts_are_cut(tok: Tokenizer):
    ing = tok.encode("ing")
    assert len(ing) == 1
    run = "ing" * 10_000
    assert tok.encode(run) == ing * 8333 + tok.encode("i") + tok.encode("ng") + ing * 1666
    assert tok.encode(run) != tok.encoding.encode_ordinary(run)
    text = "xxx" + "ing " * 100_001
    assert tok.encode(text) == tok.encode(text[:400_000]) + tok.encode(text[400_000:])
    assert tok.encode(text) != tok.encoding.encode_ordinary(text)


def _published_pieces(text: str, chars: int, run_chars: int) -> Iterator[str]:
    """Cuts text by the character loop of the published tokenizer."""
    for begin in range(0, len(text), chars):
        piece = text[begin : begin + chars]
        run, start, space = 0, 0, piece[0].isspace()
        for i, c in enumerate(piece):
            if c.isspace() != space:
                run, space = 1, c.isspace()
            else:
                run += 1
                if run > run_chars:
                    yield piece[start:i]
                    start, run = i, 1
        yield piece[start:]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(text=st.text("ab \n\x1f\u3000\x85", max_size=60))
def test_pieces_are_those_of_the_published_loop(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setattr(tokenizer, "MAX_ENCODE_CHARS", 17)
    monkeypatch.setattr(tokenizer, "MAX_RUN_CHARS", 3)
    assert list(tokenizer._pieces(text)) == list(_published_pieces(text, 17, 3))


RUNS = st.lists(
    st.tuples(st.sampled_from([" ", "\n", "\u3000", "a", "好", "ab ", "<|im_end|>"]), st.integers(1, 60_000))
)


@settings(max_examples=25, deadline=None)
@given(runs=RUNS.filter(lambda runs: sum(count for _, count in runs) < 200_000), allow_special=st.booleans())
def test_texts_of_long_runs_are_encoded_as_the_published_loop_cuts_them(
    tok: Tokenizer, runs: list[tuple[str, int]], allow_special: bool
):
    text = "".join(word * count for word, count in runs)
    special = "all" if allow_special else set()
    pieces = _published_pieces(text, 400_000, 25_000)
    expected = [
        i for piece in pieces for i in tok.encoding.encode(piece, allowed_special=special, disallowed_special=())
    ]
    assert tok.encode(text, allow_special) == expected
    assert tok.decode(expected) == text


@pytest.mark.parametrize("length", [24_999, 25_000, 25_001, 50_000, 50_001])
@pytest.mark.parametrize("start", [0, 1, 12_500, 12_501, 12_502, 30_007])
def test_runs_are_cut_wherever_they_begin(length: int, start: int):
    text = "a " * (start // 2) + " " * (start % 2) + "b" * length + "\n" + "c" * length + " d" * 9
    assert list(tokenizer._pieces(text)) == list(_published_pieces(text, 400_000, 25_000))


@settings(max_examples=100)
@given(ids=st.lists(st.integers(-2, 770) | st.integers(), max_size=8))
def test_ids_decode_to_their_bytes_or_the_first_unknown_one_is_named(tok: Tokenizer, ids: list[int]):
    unknown = [i for i in ids if not 0 <= i < 768]
    if unknown:
        with pytest.raises(ValueError, match=f"^token id {unknown[0]} is outside the vocabulary of 768$"):
            tok.decode_bytes(ids)
    else:
        expected = b"".join(tok.encoding.decode_single_token_bytes(i) for i in ids)
        assert tok.decode_bytes(ids) == tok.decode_bytes(iter(ids)) == tok.decode_bytes(np.array(ids, int)) == expected


@given(text=st.text())
def test_text_survives_and_streams(tok: Tokenizer, text: str):
    whole = tok.decode(ids := tok.encode(text, allow_special=False))
    assert whole == text
    stream = StreamDecoder(tok)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == whole


def test_stream_holds_back_half_a_character(tok: Tokenizer):
    ids = tok.encode("🌍é")
    assert len(ids) > 2
    stream = StreamDecoder(tok)
    pieces = [stream.push([i]) for i in ids[:-1]]
    assert [p for p in pieces if p] == ["🌍"]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}" == tok.decode(ids[:-1])[1:]
    assert tok.decode_bytes(ids[:2]) == "🌍".encode()[: len(tok.decode_bytes(ids[:2]))]


def test_lone_surrogate_is_replaced_not_fatal(tok: Tokenizer):
    assert tok.decode(tok.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("bad", [[768], [3, -1]])
def test_ids_beyond_the_vocabulary(tok: Tokenizer, bad: list[int]):
    with pytest.raises(ValueError, match=f"token id {bad[-1]} is outside the vocabulary of 768"):
        tok.decode(bad)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_missing_file(name: str, tmp_path: Path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:300], lines[300][:-4] + "\n"], "line 301: expected 'base64 rank'"),
        (lambda lines: [*lines[:9], "!!!! 9\n", *lines[10:]], "line 10: expected 'base64 rank'"),
        (lambda lines: [*lines[:300], *lines[301:]], "the 511 distinct tokens do not have the ranks 0..510"),
        (lambda lines: [*lines, lines[3]], None),
        (
            lambda lines: [f"{base64.b64encode(b'zz').decode()} 0\n", *lines[1:]],
            "1 of the 256 single bytes have no rank",
        ),
        (lambda lines: [], "256 of the 256 single bytes"),
    ],
)
def test_damaged_ranks(damage, message: str | None, tmp_path: Path):
    write_tiny_tokenizer(tmp_path)
    file = tmp_path / "tiktoken.model"
    file.write_text("".join(damage(file.read_text().splitlines(keepends=True))))
    if message is None:  # a line given twice changes nothing
        assert Tokenizer.from_folder(tmp_path).vocab_size == 768
        return
    with pytest.raises(ValueError, match=f"tiktoken.model.*{message}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"added_tokens_decoder": {"900": {"content": "<|x|>"}}},
            r"added_tokens_decoder\['900'\].*expected an id in 512..767",
        ),
        ({"added_tokens_decoder": {"600": {}}}, r"added_tokens_decoder\['600'\] = None"),
        (
            {"added_tokens_decoder": {"600": {"content": "a"}, "601": {"content": "a"}}},
            "added_tokens_decoder gives one content to two ids",
        ),
        ({"added_tokens_decoder": []}, "added_tokens_decoder is a list"),
        ({"pad_token": "<|pad|>"}, "pad_token is '<|pad|>', which is none"),
        ({"added_tokens_decoder": {"٦٠٠": {"content": "a"}}}, "added_tokens_decoder.* expected an id in 512..767"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder.* expected an id in 512..767"),
        ({"added_tokens_decoder": {"0600": {"content": "a"}, "600": {"content": "b"}}}, ".*one id twice"),
        ({"added_tokens_decoder": {"600": {"content": ""}}}, r"added_tokens_decoder\['600'\] = ''"),
        ({"added_tokens_decoder": {"600": {"content": "x" * 1001}}}, r"added_tokens_decoder\['600'\] = 'xxx"),
        ({"added_tokens_decoder": {"600": {"content": "\ud800"}}}, "not UTF-8 text"),
        ({"added_tokens_decoder": {"600": 5}}, r"added_tokens_decoder\['600'\] = 5"),
        ({"bos_token": []}, r"bos_token is \[\], which is none"),
        ({"eos_token": {"content": {}}}, "eos_token is {}, which is none"),
        ({"model_max_length": float("nan")}, "holds NaN"),
        ({"add_bos_token": True}, "add_bos_token is True, expected false or nothing"),
        ({"split_special_tokens": 1}, "split_special_tokens is 1, expected false or nothing"),
        ('{"bos_token": "[BOS]", "bos_token": "[EOS]"}', "gives the name 'bos_token' twice"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nests deeper than 64 levels"),
        ({"pad_token": {"content": "<|pad|>"}}, "pad_token is '<|pad|>', which is none"),
        ("not json", "not JSON"),
        ([], "expected a JSON object, found a list"),
    ],
)
def test_damaged_config(change, message: str, tmp_path: Path):
    write_tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(
        change if isinstance(change, str) else json.dumps(config | change if isinstance(change, dict) else change)
    )
    with pytest.raises(ValueError, match="tokenizer_config.json: " + message.replace("|", r"\|")):
        Tokenizer.from_folder(tmp_path)


def change_config(folder: Path, **changes: Any) -> Path:
    write_tiny_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_null_tokens_have_no_id(tmp_path: Path):
    tok = Tokenizer.from_folder(change_config(tmp_path, bos_token=None, pad_token=None, add_bos_token=False))
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, 513, None)
    assert tok.encode("[PAD]") == [767]


def test_unknown_keys_are_named_once(tmp_path: Path):
    folder = change_config(
        tmp_path, byte_fallback=True, unigram="\x1b", image_token="<|media_pad|>", padding_side="left"
    )
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: not read: byte_fallback, unigram$") as caught:
        Tokenizer.from_folder(folder)
    assert len(caught) == 1


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, giant])
def test_pipes_folders_and_giants_are_not_read(tmp_path: Path, name: str, make: Callable[[Path], object]):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: (not a regular file|has 1,099,511,627,776 bytes)"):
        Tokenizer.from_folder(tmp_path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    damage=st.lists(st.tuples(st.integers(0, 2**12), st.binary(max_size=3)), min_size=1, max_size=3),
    which=st.booleans(),
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: list[tuple[int, bytes]], which: bool):
    write_tiny_tokenizer(tmp_path)
    file = tmp_path / ("tiktoken.model" if which else "tokenizer_config.json")
    data = bytearray(file.read_bytes())
    for at, piece in damage:
        data[at : at + len(piece)] = piece
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            Tokenizer.from_folder(tmp_path)
        except ValueError as error:
            assert file.name in str(error) and "\n" not in str(error)
