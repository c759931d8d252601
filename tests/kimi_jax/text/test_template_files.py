"""The files of a folder's chat templates, the choice among them, and when the built-in template of K2.5 is used
instead."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from chat_cases import FULL, KIMI_LIKE, TOOLS, folder, user

from kimi_jax.text import chat
from kimi_jax.text.template_choice import follows
from kimi_jax.text.template_files import MAX_TEMPLATE_BYTES, has_template

TWO = {"default": "plain", "tool_use": "with tools"}


def stored(path: Path, template: Any, file: str = "tokenizer_config.json") -> Path:
    (path / file).write_text(json.dumps({"chat_template": template}))
    return path


def both(model: Path) -> tuple[str, str]:
    return chat.render([user("a")], model=model), chat.render([user("a")], TOOLS, model=model)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("form", [TWO, [{"name": name, "template": source} for name, source in TWO.items()]])
def test_named_templates(tmp_path: Path, file: str, form: Any):
    assert both(stored(tmp_path, form, file)) == ("plain", "with tools")


@pytest.mark.parametrize("form", ["one", {"default": "one"}, [{"name": "default", "template": "one"}]])
def test_one_template_serves_both(tmp_path: Path, form: Any):
    assert both(stored(tmp_path, form)) == ("one", "one")


def test_which_file_wins(tmp_path: Path):
    assert not has_template(tmp_path)
    stored(tmp_path, "config")
    assert both(tmp_path) == ("config", "config")
    stored(tmp_path, "json", "chat_template.json")
    assert both(tmp_path) == ("json", "json")
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert both(tmp_path) == ("jinja", "jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("jinja, tools")
    assert both(tmp_path) == ("jinja", "jinja, tools")
    assert has_template(tmp_path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (5, "chat_template is neither a string"),
        ([], "chat_template is neither a string"),
        ([{"name": "default"}], "chat_template is neither a string"),
        ([{"name": ["default"], "template": "a"}], "chat_template is neither a string"),
        (["a"], "chat_template is neither a string"),
        ({"default": None}, "chat_template is neither a string"),
        ([{"name": "a", "template": "a"}, {"name": "a", "template": "b"}], "chat_template gives a name twice"),
        ({"rag": "a"}, r"none of 'k2.5', 'k2', 'k3'.*it has templates of the names \['rag'\]"),
        ("a" * (MAX_TEMPLATE_BYTES + 1), "has 1,048,577 characters, expected at most 1,048,576"),
    ],
)
def test_what_is_no_template(tmp_path: Path, form: Any, message: str):
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
        chat.render([user("a")], model=stored(tmp_path, form))


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_are_not_read(tmp_path: Path, name: str, make: Any):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not a regular file"):
        chat.render([user("a")], model=tmp_path)


def test_a_long_file_is_not_read(tmp_path: Path):
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"chat_template.jinja: has 1,099,511,627,776 bytes, expected at most"):
        chat.render([user("a")], model=tmp_path)


def test_links_are_followed(tmp_path: Path):
    (tmp_path / "blob").write_text("linked")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "blob")
    assert chat.render([user("a")], model=tmp_path / "model") == "linked"


def test_generation_blocks_as_in_transformers(tmp_path: Path):
    template = """\
{% for m in messages %}
  {% if m.role == 'assistant' %}
    {% generation %}
    {% set name = 'in' %}
    {{ m.content }}{{ name }}
    {% endgeneration %}
  {% else %}
{{ m.content }}
  {% endif %}
{% endfor %}"""
    messages = [user("a"), {"role": "assistant", "content": "b"}]
    assert chat.render(messages, model=folder(tmp_path, template)) == "a\n    bin\n"


def test_k25_s_own_rules_are_the_built_in_ones(tmp_path: Path):
    assert follows(folder(tmp_path, KIMI_LIKE), "k2.5")
    assert follows(folder(tmp_path, "{# another text #}" + KIMI_LIKE), "k2.5")
    kept = KIMI_LIKE.replace("and thinking -%}", "and (thinking or preserve_thinking) -%}")
    assert follows(folder(tmp_path, kept), "k2.5")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("and thinking -%}", "or true -%}"),  # K2.7-Code keeps all reasoning
        ("{{ tools_ts_str }}", "{{ tools | tojson }}"),
        ("<|media_end|>{{ '\\n' }}", "<|media_end|>"),
        ("{%- if not thinking -%}</think>{%- endif -%}", ""),
        ("{{ message.name or message.role }}", "{{ message.role }}"),
        ("{%- elif message.content is not none -%}", "{%- else -%}"),  # fails for a message without content
        ("arguments | tojson }}", "arguments | tojson(indent=1) }}"),
        ("{{ message.content }}", "{{ message.content | trim }}"),
        ("{%- macro", "{%- nothing"),
    ],
)
def test_other_rules_are_seen(tmp_path: Path, old: str, new: str):
    assert old in KIMI_LIKE
    assert not follows(folder(tmp_path, KIMI_LIKE.replace(old, new)), "k2.5")


def test_a_template_for_tools_counts_too(tmp_path: Path):
    stored(tmp_path, {"default": KIMI_LIKE, "tool_use": "{{ raise_exception('no') }}"})
    assert not follows(tmp_path, "k2.5")
    with pytest.raises(ValueError, match="does not take these messages: no"):
        chat.render(FULL, TOOLS, model=tmp_path)
