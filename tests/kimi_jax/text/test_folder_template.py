"""A folder's own templates, rendered as transformers renders them, and as safe against forged turns as the built-in
ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_cases import EVIL, FIELDS, FULL, KIMI_LIKE, TOOLS, folder, poisoned, special, user

from kimi_jax.text import Tokenizer, chat


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer_dir)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("end", [1, 2, 3, 4])
def test_a_template_with_the_rules_of_k25_gives_its_prompt_and_tokens(
    tok: Tokenizer, tmp_path: Path, thinking: bool, end: int
):
    folder(tmp_path, KIMI_LIKE)
    messages = FULL[:end] if end != 4 else [*FULL, {"role": "assistant", "content": "done"}, user("more")]
    assert chat.render(messages, TOOLS, thinking, tmp_path) == chat.render(messages, TOOLS, thinking)
    assert chat.encode(tok, messages, TOOLS, thinking, tmp_path) == chat.encode(tok, messages, TOOLS, thinking)


@pytest.mark.parametrize("path", FIELDS, ids=str)
def test_nobody_forges_a_turn(tok: Tokenizer, tmp_path: Path, path: tuple[Any, ...]):
    folder(tmp_path, KIMI_LIKE)
    attacked = poisoned(path)
    ids = chat.encode(tok, **attacked, model=tmp_path)
    assert special(ids) == special(chat.encode(tok, FULL, TOOLS, model=tmp_path))
    assert tok.decode(ids) == chat.render(**attacked, model=tmp_path)
    assert "obey" in tok.decode(ids)


@pytest.mark.parametrize("path", [p for p in FIELDS if p[0] == "tools"], ids=str)
def test_nobody_forges_a_turn_in_json(tok: Tokenizer, tmp_path: Path, path: tuple[Any, ...]):
    folder(tmp_path, "<|im_system|>{{ tools | tojson }}<|im_end|>")
    ids = chat.encode(tok, **poisoned(path), model=tmp_path)
    assert special(ids) == [tok.special_tokens["<|im_system|>"], tok.special_tokens["<|im_end|>"]]
    assert tok.decode(ids) == chat.render(**poisoned(path), model=tmp_path)


@pytest.mark.parametrize("name", ["think", "|im_end|", "<|im_", "/think", "\U000f0001think"])
def test_a_marker_half_from_the_template_is_text(tok: Tokenizer, tmp_path: Path, name: str):
    folder(tmp_path, "{% for m in messages %}<{{ m.name }}>{{ m.name }}{{ m.content }}{% endfor %}<|im_end|>")
    messages = [{"role": "user", "name": name, "content": "end|>"}]
    ids = chat.encode(tok, messages, model=tmp_path)
    assert special(ids) == [tok.special_tokens["<|im_end|>"]]
    assert tok.decode(ids) == chat.render(messages, model=tmp_path) == f"<{name}>{name}end|><|im_end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | upper }}", "hi <|im_end|>"),
        ("{% if '</think>' in messages[0].content %}seen{% else %}{{ messages[0].content }}{% endif %}", "a</think>b"),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "end"),
    ],
)
def test_a_template_that_works_on_peoples_text_is_refused(tok: Tokenizer, tmp_path: Path, template: str, text: str):
    folder(tmp_path, template)
    assert chat.render([user(text)], model=tmp_path)
    with pytest.raises(ValueError, match="looks into or changes people's text"):
        chat.encode(tok, [user(text)], model=tmp_path)


def test_trimming_and_slicing_keep_text_safe(tok: Tokenizer, tmp_path: Path):
    folder(tmp_path, "{{ messages[0].content | trim }}|{{ messages[0].content[1:] }}<|im_end|>")
    ids = chat.encode(tok, [user(f" {EVIL} ")], model=tmp_path)
    assert special(ids) == [tok.special_tokens["<|im_end|>"]]
    assert tok.decode(ids) == f"{EVIL}|{EVIL} <|im_end|>"


def test_video_placeholder_of_the_template_takes_chunks(tok: Tokenizer, tmp_path: Path):
    folder(tmp_path, "{{ messages[0].content[0].text }}<|kimi_k25_video_placeholder|>")
    video = [{"type": "text", "text": "<|kimi_k25_video_placeholder|>"}, {"type": "video", "video": "v"}]
    ids = chat.encode(tok, [user(video)], model=tmp_path, videos=[[]])
    assert tok.decode(ids) == "<|kimi_k25_video_placeholder|>"
    assert special(ids) == []


def test_json_dates_tokens_and_blocks_as_in_transformers(tmp_path: Path):
    template = """\
{{ bos_token }}{{ messages[0].content | tojson }}{{ tools | tojson(indent=1) }}
  {% if strftime_now('%Y') | int > 2000 %}
now
  {% endif %}
{{ tools_ts_str is defined }}"""
    folder(tmp_path, template, bos_token={"content": "[BOS]"}, eos_token=None, chat_template="not this one")
    prompt = chat.render([user("<é>")], [{"type": "x", "b": 1, "a": 2}], model=str(tmp_path))
    assert prompt == '[BOS]"<é>"[\n {\n  "a": 2,\n  "b": 1,\n  "type": "x"\n }\n]\nnow\nFalse'


def test_template_in_the_tokenizer_config(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert chat.render([user("Hi")], model=tmp_path) == "Hi!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template does not compile"),
        ("{{ raise_exception('no system role') }}", "does not take these messages: no system role"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}", "does not take these messages"),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
    ],
)
def test_broken_and_unsafe_templates(tmp_path: Path, template: str, message: str):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
        chat.render([user("Hi")], model=folder(tmp_path, template))


@pytest.mark.parametrize("model", ["k2-5", "no/such/folder"])
def test_no_template(model: str):
    with pytest.raises(ValueError, match=f"{model}: none of 'k2.5', 'k2', 'k3', nor a folder with chat_template.jinja"):
        chat.render([user("Hi")], model=model)


def test_damaged_tokenizer_config(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
        chat.render([user("Hi")], model=tmp_path)
