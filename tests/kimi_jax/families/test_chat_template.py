"""A folder's own chat template, or its family's built-in one."""

import warnings
from pathlib import Path

import pytest

from checkpoints.toy import toy_config
from kimi_jax import chat
from kimi_jax.config_json import from_dict
from kimi_jax.families import FAMILIES
from kimi_jax.families.chat import template_for
from kimi_jax.text.templates import BUILT_IN

# What Kimi K2's published template says, written by its rules.
K2_LIKE = """\
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if messages[0].role != 'system' -%}
  <|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- set side = {'user': 'user', 'assistant': 'assistant'}.get(message.role, 'system') -%}
  <|im_{{ side }}|>{{ message.name or message.role }}<|im_middle|>
  {%- if message.role == 'tool' -%}## Return of {{ message.tool_call_id }}{{ '\n' }}{%- endif -%}
  {%- if message.content is string -%}
    {{ message.content }}
  {%- elif message.content is not none -%}
    {%- for part in message.content -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
  {%- if message.tool_calls -%}
    <|tool_calls_section_begin|>
    {%- for call in message.tool_calls -%}
      <|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
      {%- if call.function.arguments is string -%}{{ call.function.arguments }}
      {%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
      <|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


@pytest.mark.parametrize(
    ("like", "template", "expected"),
    [
        ("k2.5", None, "k2.5"),
        ("k2", None, "k2"),
        ("kimi-linear", None, "k2"),
        ("k2", K2_LIKE, "k2"),
        ("kimi-linear", K2_LIKE, "k2"),
        ("k2", K2_LIKE.replace("You are Kimi", "You are Kimi K2"), "its own"),
        ("k2.5", K2_LIKE, "its own"),
        ("kimi-linear", "{}", "its own"),
    ],
)
def test_template_for(tmp_path: Path, like: str, template: str | None, expected: str) -> None:
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = template_for(tmp_path, from_dict(toy_config(like)))
    assert found == (str(tmp_path) if expected == "its own" else expected)
    differs = f"its own chat template is used, which differs from {'K2.5' if like == 'k2.5' else 'K2'}'s"
    assert [str(one.message) for one in caught] == ([f"{tmp_path}: {differs}"] if expected == "its own" else [])


def test_a_template_for_tools_alone_is_the_folder_s(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(K2_LIKE)
    with pytest.warns(UserWarning, match="its own chat template is used"):
        assert template_for(tmp_path, from_dict(toy_config("k2"))) == str(tmp_path)


def test_every_family_has_a_built_in_template() -> None:
    for family in FAMILIES:
        assert family.template in BUILT_IN
        assert chat.render([{"role": "user", "content": "Hello"}], model=family.template)
