"""The one form of request inside the server, and how it becomes a prompt with settings.

The translations of OpenAI's and Anthropic's APIs make a `Chat`; `prepare` makes of it what the engine takes.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kimi_jax.printable import printable
from kimi_jax.server.backend import Backend, Prompt, Settings
from kimi_jax.server.errors import invalid
from kimi_jax.server.masks import Masks
from kimi_jax.text import Tokenizer, chat, grammar
from kimi_jax.text.answer_states import SPELLINGS, Marker
from kimi_jax.text.messages import REASONING
from kimi_jax.text.modes import TEMPERATURE, TOP_P
from kimi_jax.text.parsers import beginning_of_content, end_of_reasoning
from kimi_jax.text.templates import template_options
from kimi_jax.text.xtml import EFFORTS

SamplingMode = Literal["open", "kimi"]

# Where a request does not say: Moonshot's own limit, or what the context leaves.
DEFAULT_MAX_TOKENS = 32_768
MAX_CHOICES = 8
MAX_STOPS, MAX_STOP_LENGTH = 5, 1_000
SEEDS = 2**63
BEGIN_CALLS = (Marker.BEGIN_SECTION, Marker.BEGIN_CALL)


@dataclass(frozen=True)
class Chat:
    """A conversation to answer.

    thinking: None is the model's default. effort: how much to think, None and "none" say nothing; the client's API
    calls it `effort_field`. budget: the most tokens of reasoning. content: the right side of a grammar's rule for the
    content. form: the object of OpenAI's `response_format` that `content` is of, which some prompts show. sampling: the
    values that the client gave. max_tokens: None is as many as there is room for.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = None
    parallel: bool = True
    content: str | None = None
    thinking: bool | None = None
    preserve_thinking: bool = False
    budget: int | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    seed: int | None = None
    choices: int = 1
    effort: str | None = None
    form: Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    effort_field: str = "reasoning_effort"


@dataclass(frozen=True)
class Generation:
    """A prompt and what to generate after it. `settings` has an entry for each choice; `tools` are those of the prompt;
    `plain` says that the answer is text without parts."""

    prompt: Prompt
    settings: tuple[Settings, ...]
    stop: tuple[str, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    plain: bool = False


def prepare(backend: Backend, masks: Masks, request: Chat, mode: SamplingMode, thinks: bool) -> Generation:
    """Returns the prompt and settings of a conversation.

    thinks: whether the model's template knows thinking. Raises `RequestError` for what cannot be served. It takes
    milliseconds, and seconds where there are large pictures: the event loop should not wait for it.
    """
    thinking = thinks and request.thinking is not False
    prompt = write_prompt(backend, request, thinking)
    max_tokens = room(backend, len(prompt.ids), request.max_tokens)
    reasoning = chat.answer_starts_in(backend.tokenizer, prompt.ids) == "reasoning"
    written = _grammar(backend.tokenizer, request, reasoning)
    budget = request.budget
    if written is not None and reasoning:
        # An answer of a form needs an end of its reasoning, whatever the weights.
        budget = max_tokens // 2 if budget is None else budget
    providers = masks.providers(written, reasoning, budget, max_tokens, request.choices)
    banned = () if request.tools else _begins_calls(backend.tokenizer)
    values = sampling_values(request, mode, thinking)
    seeds = choice_seeds(request.seed, request.choices)
    return Generation(
        prompt,
        tuple(
            Settings(max_tokens, values, seed, request.top_logprobs, banned, provider)
            for seed, provider in zip(seeds, providers, strict=True)
        ),
        request.stop,
        request.tools,
    )


def write_prompt(backend: Backend, request: Chat, thinking: bool) -> Prompt:
    """Returns a conversation's prompt, which ends in the beginning of an answer where the last message is partial."""
    messages = list(request.messages)
    for index, message in enumerate(messages[:-1]):
        if message.get("partial"):
            raise invalid(f"messages[{index}].partial is true, expected so in the last message alone", "messages")
    if not messages or not messages[-1].get("partial"):
        return backend.prompt(messages, request.tools, thinking, request.preserve_thinking, _options(backend, request))
    last, where = messages.pop(), f"messages[{len(messages)}]"
    content, reasoning = last.get("content"), next((last[key] for key in REASONING if last.get(key)), None)
    if last["role"] != "assistant" or not isinstance(content, str) or last.get("tool_calls"):
        raise invalid(f"{where}.partial is true, expected so of an assistant's message with a text", "messages")
    if request.content is not None:
        raise invalid("response_format goes without a partial message", "response_format")
    prompt = backend.prompt(messages, request.tools, thinking, request.preserve_thinking, _options(backend, request))
    tok, ids = backend.tokenizer, list(prompt.ids)
    if last.get("name"):
        ids = _named(tok, ids, str(last["name"]))
    if chat.answer_starts_in(tok, ids) == "reasoning":
        if not reasoning:
            raise invalid(f"{where} is partial, which with thinking needs its reasoning_content", "messages")
        ids += [*tok.encode(str(reasoning), allow_special=False), *end_of_reasoning(tok), *beginning_of_content(tok)]
    return Prompt(ids + tok.encode(content, allow_special=False), prompt.media)


def room(backend: Backend, prompt: int, max_tokens: int | None) -> int:
    """Returns the most new tokens after a prompt of so many. Raises `RequestError` where they do not fit."""
    left = backend.max_length - prompt
    if left < 1 or (max_tokens is not None and not 1 <= max_tokens <= left):
        raise invalid(
            f"the prompt has {prompt:,} tokens and max_tokens is {'absent' if max_tokens is None else max_tokens}, "
            f"expected at least 1 new token and at most {backend.max_length:,} tokens in all",
            "max_tokens",
            "context_length_exceeded",
        )
    return min(left, DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens


def choice_seeds(seed: int | None, choices: int) -> list[int]:
    """Returns a seed for each choice, the first the request's own; without one they are drawn."""
    first = secrets.randbelow(SEEDS) if seed is None else seed
    return [(first + index) % SEEDS for index in range(choices)]


def sampling_values(request: Chat, mode: SamplingMode, thinking: bool) -> dict[str, float | int]:
    """Returns the values for drawing tokens, those absent as Moonshot recommends them.

    Mode "kimi" takes what Moonshot's own API takes: temperature 0 to 1, top_p 0.95, no penalties, one choice. Raises
    `RequestError` for anything else.
    """
    values: dict[str, float | int] = {"temperature": TEMPERATURE[thinking], "top_p": TOP_P, **request.sampling}
    if not 1 <= request.choices <= MAX_CHOICES:
        raise invalid(f"n is {request.choices}, expected 1 to {MAX_CHOICES}", "n")
    if request.choices > 1 and values["temperature"] == 0:
        raise invalid(f"n is {request.choices} with temperature 0, where all choices are the same; expected 1", "n")
    if mode == "kimi":
        fixed = {"top_p": TOP_P, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
        if not 0 <= values["temperature"] <= 1:
            raise invalid(
                f"temperature is {values['temperature']}, expected 0 to 1 with --sampling kimi", "temperature"
            )
        for name, expected in fixed.items():
            if values.get(name, expected) != expected:
                raise invalid(f"{name} is {values[name]}, expected {expected} with --sampling kimi", name)
        if request.choices != 1:
            raise invalid(f"n is {request.choices}, expected 1 with --sampling kimi", "n")
    elif not 0 <= values["temperature"] <= 2:
        raise invalid(f"temperature is {values['temperature']}, expected 0 to 2", "temperature")
    return values


def _options(backend: Backend, request: Chat) -> dict[str, Any]:
    """Returns what the template shows of a request and only some templates do. Raises `RequestError` for an effort that
    the template does not know."""
    known = template_options(backend.template)
    effort = None if request.effort == "none" else request.effort
    if "thinking_effort" in known and effort not in (None, *EFFORTS):
        raise invalid(
            f"{request.effort_field} is {printable(repr(effort), 60)}, expected none, {', '.join(EFFORTS)}",
            request.effort_field.split(".")[0],
        )
    choice = request.tool_choice if request.tool_choice in (None, "auto", "none") else "required"
    options = {"thinking_effort": effort, "tool_choice": choice, "response_format": request.form}
    return {name: value for name, value in options.items() if name in known and value is not None}


def _grammar(tok: Tokenizer, request: Chat, reasoning: bool) -> str | None:
    """Returns the grammar that the answer is held to, None where it is free.

    A model that may call tools, or not, writes calls by itself: a mask of its tokens would cost a round trip each.
    """
    strict = any(tool["function"].get("strict") for tool in request.tools or ())
    free = request.tool_choice in (None, "auto") and request.content is None and request.parallel and not strict
    try:
        written = grammar.write_grammar(
            tok,
            request.tools,
            "none" if free else request.tool_choice,
            content=request.content,
            parallel=request.parallel,
            number=grammar.next_number(request.messages),
            reasoning=reasoning,
        )
    except ValueError as error:
        raise invalid(str(error), _field(str(error))) from None
    return None if free else written


def _begins_calls(tok: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that begin calls in K2's answers, which no answer may have where no tool is declared.

    In K3's a text says what begins, so none of its tokens can be banned.
    """
    found = (tok.special_tokens.get(spelling) for spelling, marker in SPELLINGS.items() if marker in BEGIN_CALLS)
    return tuple(token for token in found if token is not None)


def _named(tok: Tokenizer, ids: list[int], name: str) -> list[int]:
    """Returns a prompt whose last turn, the answer's, has another name in its header."""
    begin, middle = (tok.special_tokens.get(marker, -1) for marker in ("<|im_assistant|>", "<|im_middle|>"))
    if begin not in ids or middle not in ids:
        raise invalid("the chat template of this model has no names in partial messages", "messages")
    start = len(ids) - ids[::-1].index(begin)
    stop = len(ids) - 1 - ids[::-1].index(middle)
    return ids[:start] + tok.encode(name, allow_special=False) + ids[stop:]


def _field(message: str) -> str:
    """Returns the field that a message of `write_grammar` begins with."""
    return message.split(" ", 1)[0].split(".")[0].split("[")[0]
