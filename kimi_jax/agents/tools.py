"""Tools of an agent: their declaration, the check of what a model passes, and the words that it gets for a failure."""

import asyncio
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry

from kimi_jax import json_reader
from kimi_jax.agents.model import Content, Parts

ERROR_LENGTH = 2_000
_TYPES: Mapping[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


class ToolError(Exception):
    """Is raised by a tool whose message is for the model as it stands, after `Error: `."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    parameters: the JSON Schema of the arguments, an object.
    run: is called with the arguments by name. A coroutine function is cancelled when it takes too long; another one
        runs in a thread, which goes on to its end.
    timeout: seconds that a call may take; None is no limit.
    counts: whether a call is taken from the budget of tool calls.
    asks: whether a person's yes is needed before each call, as for what writes, runs code or reaches a network. It is
        for who makes the tool available to ask: the `kimi-jax` command does, `Agent` does not.
    opens: whether `run` is called once for each conversation, without arguments, and returns an asynchronous context
        manager; its value is then called in the place of `run`, and it is closed when the conversation ends.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any]
    timeout: float | None = 60.0
    counts: bool = True
    asks: bool = False
    opens: bool = False

    @property
    def declaration(self) -> dict[str, Any]:
        """Returns the tool as OpenAI's schema declares it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @functools.cached_property
    def validator(self) -> Draft202012Validator:
        """The validator of arguments, made once for all agents that have the tool.

        Raises jsonschema.SchemaError where `parameters` are no JSON Schema.
        """
        Draft202012Validator.check_schema(self.parameters)
        # The empty registry keeps a stranger's "$ref" from opening URLs
        return Draft202012Validator(self.parameters, registry=Registry())


def tool(function: Callable[..., Any]) -> Tool:
    """Returns a tool of a function: its name, docstring and the types of its parameters.

    Raises TypeError for a parameter whose type is not str, int, float, bool, list or dict.
    """
    hints, properties, required = typing.get_type_hints(function), {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = typing.get_origin(hints.get(name)) or hints.get(name)
        if kind not in _TYPES:
            raise TypeError(
                f"{function.__name__}: the parameter {name} is {kind}, expected str, int, float, bool, list or dict"
            )
        properties[name] = {"type": _TYPES[kind]}
        if parameter.default is parameter.empty:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(function.__name__, inspect.getdoc(function) or "", schema, function)


class Toolset:
    """The tools of one agent by name.

    Raises ValueError where two tools have one name, and jsonschema.SchemaError where parameters are no JSON Schema.
    """

    def __init__(self, tools: Sequence[Tool]):
        self._tools: dict[str, Tool] = {}
        for one in tools:
            if one.name in self._tools:
                raise ValueError(f"two tools have the name {one.name!r}")
            self._tools[one.name] = one
            one.validator  # noqa: B018, a schema that is none is refused here and not at the first call
        self.declarations = [one.declaration for one in tools]

    async def open(self, stack: AsyncExitStack) -> "Toolset":
        """Returns the tools for one conversation: those that are opened are closed with `stack`."""
        tools = list(self._tools.values())
        if not any(one.opens for one in tools):
            return self
        return Toolset(
            [
                replace(one, run=await stack.enter_async_context(one.run()), opens=False) if one.opens else one
                for one in tools
            ]
        )

    def find(self, name: str) -> Tool:
        """Returns the tool of a name. Raises ToolError where there is none."""
        if name not in self._tools:
            raise ToolError(f"no tool {name!r}; there are {', '.join(self._tools) or 'none'}")
        return self._tools[name]

    def read_arguments(self, name: str, arguments: str) -> dict[str, Any]:
        """Returns the arguments of a call; an empty text is no arguments.

        Raises ToolError where they are not JSON or do not fit the tool's schema.
        """
        label = f"the arguments of {name}"
        try:
            values = json_reader.parse(arguments or "{}", label)
        except json_reader.JSONError as error:
            found = str(error).removeprefix(f"{label}: ")
            why = found if found.startswith("not JSON ") else f"not JSON ({found})"
            raise ToolError(f"{label} are {why}") from None
        wrong = next(self._tools[name].validator.iter_errors(values), None)
        if wrong is not None:
            raise ToolError(f"{wrong.json_path}: {wrong.message}")
        if not isinstance(values, dict):
            raise ToolError(f"$: {label} are not an object")
        return values


async def run_tool(one: Tool, arguments: Mapping[str, Any]) -> Content:
    """Runs a tool and returns its result: a string or `Parts` as they are, anything else as JSON.

    Raises ToolError where it takes longer than its timeout or a picture cannot be opened, and what the tool raises.
    """
    try:
        async with asyncio.timeout(one.timeout) as clock:
            if inspect.iscoroutinefunction(one.run):
                result = await one.run(**arguments)
            else:
                result = await asyncio.to_thread(one.run, **arguments)
    except TimeoutError:
        if clock.expired():
            raise ToolError(f"{one.name} took longer than {one.timeout:g} s") from None
        raise
    if isinstance(result, Parts):
        await asyncio.to_thread(_open_pictures, result)
        return list(result)
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _open_pictures(parts: Parts) -> None:
    """Raises ToolError for a picture that cannot be opened: in a prompt, it would end the run."""
    from kimi_jax.media.opening import open_image
    from kimi_jax.media.sources import from_message

    for part in parts:
        if part["type"] == "image_url":
            try:
                open_image(from_message(part["image_url"]["url"], None))
            except (ValueError, OSError) as error:
                raise ToolError(f"the result holds a picture that cannot be opened: {error}") from None


def error_text(error: BaseException) -> str:
    """Returns the words that a model gets for a failed call, 2,000 characters at most."""
    text = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
    return f"Error: {text}"[:ERROR_LENGTH]
