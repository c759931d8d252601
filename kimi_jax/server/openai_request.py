"""Translates the bodies of OpenAI's API into the server's one form of request."""

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_jax.server.backend import Backend, Prompt, Settings
from kimi_jax.server.errors import invalid
from kimi_jax.server.generation import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SEEDS,
    Chat,
    Generation,
    SamplingMode,
    choice_seeds,
    room,
    sampling_values,
)
from kimi_jax.server.openai_schema import ChatRequest, CompletionRequest, Sampled, TemplateOptions, Thinking
from kimi_jax.text import grammar
from kimi_jax.text.messages import REASONING

MOST_LOGPROBS = 20
MOST_PROMPTS = 16
# The keys that a message of the server's own form has; clients send many more.
_MESSAGE = ("role", "content", "name", "tool_call_id", *REASONING)
_PART = ("type", "text", "image_url", "video_url")


def chat_request(body: ChatRequest) -> Chat:
    """Returns the request of a chat completion. Raises `RequestError` naming the field that is wrong."""
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    _check(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true", "top_logprobs")
    top = body.top_logprobs or 0
    if not 0 <= top <= MOST_LOGPROBS:
        raise invalid(f"top_logprobs is {top}, expected 0 to {MOST_LOGPROBS}", "top_logprobs")
    options = body.chat_template_kwargs or TemplateOptions()
    keep = body.thinking is not None and body.thinking.keep == "all"
    return Chat(
        read_messages(body.messages),
        read_tools(body.tools),
        body.tool_choice,
        body.parallel_tool_calls is not False,
        _content(body),
        wants_thinking(body.thinking, options, body.reasoning_effort),
        bool(keep or options.preserve_thinking or body.preserve_thinking),
        _budget(body),
        body.max_tokens,
        body.sampling(),
        body.seed,
        1 if body.n is None else body.n,
        body.reasoning_effort,
        body.response_format if (body.response_format or {}).get("type") != "text" else None,
        stops(body.stop),
        top if body.logprobs else None,
    )


def completion(backend: Backend, body: CompletionRequest, mode: SamplingMode) -> list[Generation]:
    """Returns what to generate for each prompt of a text completion. Raises `RequestError`."""
    _check(body)
    for name, value, free in (("echo", body.echo, (None, False)), ("suffix", body.suffix, (None, ""))):
        if value not in free:
            raise invalid(f"{name} is not offered here", name)
    choices = 1 if body.n is None else body.n
    if body.best_of not in (None, choices):
        raise invalid(f"best_of is {body.best_of}, expected the value of n, {choices}", "best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MOST_LOGPROBS:
        raise invalid(f"logprobs is {body.logprobs}, expected 0 to {MOST_LOGPROBS}", "logprobs")
    wanted = Chat([], sampling=body.sampling(), choices=choices)
    values = sampling_values(wanted, mode, thinking=True)
    found = []
    for ids in _prompts(backend, body.prompt):
        most = room(backend, len(ids), 16 if body.max_tokens is None else body.max_tokens)
        settings = tuple(Settings(most, values, seed, body.logprobs) for seed in choice_seeds(body.seed, choices))
        found.append(Generation(Prompt(ids), settings, stops(body.stop), plain=True))
    return found


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with the keys that mean something here; what is wrong in them is found when they are written."""
    if not messages:
        raise invalid("messages is empty, expected at least one message", "messages")
    read = []
    for message in messages:
        kept = {key: message[key] for key in _MESSAGE if message.get(key) is not None}
        if message.get("role") == "assistant" and message.get("partial") is True:
            kept["partial"] = True
        if isinstance(content := kept.get("content"), list):
            kept["content"] = [
                {key: part[key] for key in _PART if key in part} if isinstance(part, Mapping) else part
                for part in content
            ]
        if "content" not in kept:
            kept["content"] = None
        if message.get("tool_calls") is not None:
            kept["tool_calls"] = _calls(message["tool_calls"])
        read.append(kept)
    return read


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Returns tools, None where there are none. Raises `RequestError` for one that is no function."""
    if len(tools or ()) > grammar.MAX_TOOLS:
        raise invalid(f"tools has {len(tools or ())} tools, expected at most {grammar.MAX_TOOLS}", "tools")
    for index, tool in enumerate(tools or ()):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
            raise invalid(f"tools[{index}] is no object of type function with a function", "tools")
    return [dict(tool) for tool in tools] if tools else None


def wants_thinking(
    thinking: Thinking | None,
    options: TemplateOptions,
    effort: str | None = None,
    effort_field: str = "reasoning_effort",
) -> bool | None:
    """Returns whether a request wants thinking, in whichever way it says so, None where it does not say.

    Raises `RequestError` where its fields differ; the effort's is `effort_field`.
    """
    said: dict[str, bool] = {}
    if thinking is not None and thinking.type is not None:
        if thinking.type not in ("enabled", "disabled"):
            raise invalid("thinking.type is neither enabled nor disabled", "thinking")
        said["thinking"] = thinking.type == "enabled"
    for name in ("thinking", "enable_thinking"):
        if (value := getattr(options, name)) is not None:
            said[f"chat_template_kwargs.{name}"] = value
    if effort == "none":
        said[effort_field] = False
    if len(set(said.values())) > 1:
        raise invalid(f"{' and '.join(said)} differ, expected one answer on thinking", "thinking")
    return next(iter(said.values()), None)


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings. Raises `RequestError` for more or longer ones than are offered."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOPS or not all(0 < len(one) <= MAX_STOP_LENGTH for one in strings):
        raise invalid(f"stop: expected at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH:,} characters", "stop")
    return strings


def _check(body: Sampled) -> None:
    if body.max_tokens is not None and body.max_tokens < 1:
        raise invalid(f"max_tokens is {body.max_tokens}, expected at least 1", "max_tokens")
    if body.seed is not None and not 0 <= body.seed < SEEDS:
        raise invalid(f"seed is {body.seed}, expected 0 to {SEEDS - 1}", "seed")
    if body.logit_bias:
        raise invalid("logit_bias is not offered here", "logit_bias")


def _calls(calls: Any) -> Any:
    if not isinstance(calls, list):
        return calls
    read = []
    for call in calls:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            function = {key: call["function"][key] for key in ("name", "arguments") if key in call["function"]}
            call = {key: call[key] for key in ("id", "type") if key in call} | {"function": function}
        read.append(call)
    return read


def _content(body: ChatRequest) -> str | None:
    """Returns the right side of the grammar's rule for the content."""
    outputs = body.structured_outputs
    try:
        rules = [
            grammar.content_rule(body.response_format),
            None if outputs is None or outputs.choice is None else grammar.choice_rule(outputs.choice),
            None if outputs is None or outputs.regex is None else grammar.pattern_rule(outputs.regex),
        ]
    except ValueError as error:
        raise invalid(str(error), "response_format" if outputs is None else "structured_outputs") from None
    given = [rule for rule in rules if rule is not None]
    if len(given) > 1:
        raise invalid("response_format, choice and regex: expected one of them", "response_format")
    return given[0] if given else None


def _budget(body: ChatRequest) -> int | None:
    budget = body.thinking_token_budget
    if budget is None and body.thinking is not None:
        budget = body.thinking.budget_tokens
    if budget is not None and budget < 0:
        raise invalid(f"the budget of thinking is {budget}, expected at least 0", "thinking_token_budget")
    return budget


def _prompts(backend: Backend, prompt: str | Sequence[Any]) -> list[list[int]]:
    """Returns the ids of each prompt; a text's special tokens are spelt out, as a stranger's."""
    many = [prompt] if isinstance(prompt, str) or all(type(one) is int for one in prompt) else list(prompt)
    if not 1 <= len(many) <= MOST_PROMPTS:
        raise invalid(f"prompt has {len(many)} prompts, expected 1 to {MOST_PROMPTS}", "prompt")
    found = []
    for one in many:
        if isinstance(one, str):
            ids = backend.tokenizer.encode(one, allow_special=False)
        elif isinstance(one, list) and all(type(token) is int for token in one):
            ids = list(one)
        else:
            raise invalid("prompt is neither texts nor lists of token ids", "prompt")
        if not ids or not 0 <= min(ids) <= max(ids) < backend.vocab_size:
            raise invalid(f"prompt: expected at least one token, of ids from 0 to {backend.vocab_size - 1}", "prompt")
        found.append(ids)
    return found
