"""Requests to a server of Kimi K3, whose reasoning and calls are elements and no single tokens."""

import pytest

from kimi_jax.server.backend import Backend, Prompt
from kimi_jax.server.errors import RequestError
from kimi_jax.server.generation import Chat, prepare
from kimi_jax.server.masks import Masks
from kimi_jax.text import Tokenizer, chat
from kimi_jax.text.tiny import K3_SLOTS, write_tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class PromptsOnly(Backend):
    """A backend that writes prompts, and answers nothing."""

    template, max_length, failed = "k3", 4096, False

    def __init__(self, tok):
        self.tokenizer, self.vocab_size, self.stop_ids = tok, tok.vocab_size, [tok.special_tokens["<|end_of_msg|>"]]

    def prompt(self, messages, tools, thinking, preserve_thinking):
        return Prompt(chat.encode(self.tokenizer, messages, tools, thinking=thinking, model=self.template))


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Returns a function from the fields of a request to what would be generated."""
    folder = tmp_path_factory.mktemp("k3")
    write_tiny_tokenizer(folder, slots=K3_SLOTS)
    backend = PromptsOnly(Tokenizer.from_folder(folder))
    masks = Masks(backend.tokenizer, backend.vocab_size, backend.stop_ids)
    return lambda **fields: prepare(backend, masks, Chat(MESSAGES, **fields), "open", thinks=True)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_model_that_may_call_tools_is_held_to_nothing(ask, thinking):
    (settings,) = ask(tools=[TOOL], thinking=thinking).settings
    assert settings.mask_provider is None


@pytest.mark.parametrize("fields", [{"budget": 5}, {"content": '"yes"'}, {"tools": [TOOL], "tool_choice": "none"}])
def test_reasoning_that_cannot_be_ended_is_refused_in_words(ask, fields):
    with pytest.raises(RequestError, match=r"no single token ends the reasoning of this model.*turn thinking off"):
        ask(**fields)


def test_a_call_that_is_to_be_forced_is_refused_in_words(ask):
    with pytest.raises(RequestError, match=r"has no special token.*with which calls of tools are written"):
        ask(tools=[TOOL], tool_choice="required", thinking=False)


def test_content_without_thinking_keeps_its_form(ask):
    (settings,) = ask(content='"yes"', thinking=False).settings
    assert settings.mask_provider.forced([])
