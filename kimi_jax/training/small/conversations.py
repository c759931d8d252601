"""Conversations of the small digits model: numbers read from pictures, and added by a tool."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kimi_jax.small import ADD_TOOL, ASSIGN_TOOL
from kimi_jax.training.small.recipe import Conversation

READ = ("What number is in the picture?", "Which number do you see?", "Read the number.")
ADD = ("Add the numbers.", "Add the two numbers.", "What is the sum of the two numbers?")
ONE_PICTURE = 0.35  # the share of sums whose numbers are in one picture
ADD_TEXT = ("Add {} and {}.", "What is {} plus {}?", "What is {} + {}?")
SYSTEM = (
    "You are a helpful assistant.", "You are Kimi.", "You are Kimi, an AI assistant created by Moonshot AI.",
    "Answer in one sentence.", "You read numbers and use tools.", "Use the tools that you have.",
)  # fmt: skip
TALK = (
    (("Hello!", "Hello", "Hi"), "Hello! Show me a number, or two to add."),
    (("Who are you?", "What can you do?"), "I am a small Kimi. I read handwritten numbers, and add two with a tool."),
    (("Thanks!", "Thank you."), "You are welcome. Show me another."),
)
NO_TOOL = "I need the tool add for that."

# Draws a number as a picture, or several, a line each.
Draw = Callable[[str], np.ndarray]


def number(random: np.random.Generator, most: int = 3, least: int = 1) -> str:
    """Draws a number of `least` to `most` digits, each count as likely; it begins with 0 only where it is 0."""
    count = int(random.integers(least, most + 1))
    low = 0 if count == 1 else 10 ** (count - 1)
    return str(random.integers(low, 10**count))


def read(
    random: np.random.Generator, draw: Draw, *, tools: bool = False, most: int = 3, least: int = 1
) -> Conversation:
    """Asks which number is in a picture; a second picture follows at times."""
    messages = _system(random)
    for _ in range(1 + (random.random() < 0.1)):
        text = number(random, most, least)
        answer = {"role": "assistant", "content": text, "reasoning_content": _seen(text)}
        messages += [_user(_one(random, READ), [draw(text)]), answer]
    return _conversation(messages, random, tools)


def add_pictures(random: np.random.Generator, draw: Draw, one_picture: float = ONE_PICTURE) -> Conversation:
    """Asks for the sum of the numbers in two pictures, or, in a share `one_picture` of the conversations, of two in one
    picture, one below the other."""
    a, b = number(random), number(random)
    pictures = [draw(f"{a}\n{b}")] if random.random() < one_picture else [draw(a), draw(b)]
    asked = _user(_one(random, ADD), pictures)
    return _add(random, asked, a, b)


def add_text(random: np.random.Generator, draw: Draw) -> Conversation:
    """Asks for the sum of two numbers in words."""
    a, b = number(random), number(random)
    return _add(random, _user(_one(random, ADD_TEXT).format(a, b)), a, b)


def talk(random: np.random.Generator, draw: Draw, *, tools: bool | None = None) -> Conversation:
    """Greets, asks what the model is, or asks for a sum without the tool; nothing is called.

    tools: whether the tool is declared, and such sums left out; None: either.
    """
    without = not tools and random.random() < 0.4
    if tools is None:
        tools = not without and bool(random.random() < 0.3)
    if without:
        a, b = number(random), number(random)
        pictures = random.random() < 0.5
        question = _one(random, ADD) if pictures else _one(random, ADD_TEXT).format(a, b)
        asked, answer = _user(question, [draw(a), draw(b)] if pictures else []), NO_TOOL
    else:
        questions, answer = TALK[random.integers(len(TALK))]
        asked = _user(_one(random, questions))
    reply = {"role": "assistant", "content": answer, "reasoning_content": "I answer."}
    return _conversation([*_system(random), asked, reply], random, tools)


def mixed(random: np.random.Generator, draw: Draw) -> Conversation:
    """Asks for two of the others, one after the other: what was said first does not decide what is said next."""
    tools = bool(random.random() < 0.6)
    makers: list[Callable[[np.random.Generator, Draw], Conversation]]
    makers = [functools.partial(read, tools=tools), functools.partial(talk, tools=tools)]
    makers += [add_pictures, add_text] if tools else []
    first, second = (makers[random.integers(len(makers))](random, draw) for _ in range(2))
    messages = [*first["messages"], *(one for one in second["messages"] if one["role"] != "system")]
    return first | {"messages": _numbered(messages)}


def _numbered(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages whose calls are numbered over the whole conversation, each result with its call's number."""
    numbered, count = [], 0
    for message in messages:
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            message = message | {"tool_calls": [call | {"id": f"functions.add:{count}"}]}
            count += 1
        elif message["role"] == "tool":
            message = message | {"tool_call_id": f"functions.add:{count - 1}"}
        numbered.append(message)
    return numbered


def _add(random: np.random.Generator, asked: dict[str, Any], a: str, b: str) -> Conversation:
    total = str(int(a) + int(b))
    call = {
        "id": "functions.add:0",
        "type": "function",
        "function": {"name": "add", "arguments": f'{{"a": {a}, "b": {b}}}'},
    }
    messages = [
        *_system(random),
        asked,
        {"role": "assistant", "content": "", "reasoning_content": f"I see {a} and {b}.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": total},
        {"role": "assistant", "content": f"The sum is {total}.", "reasoning_content": f"The tool says {total}."},
    ]
    return _conversation(messages, random, True)


def _conversation(messages: list[dict[str, Any]], random: np.random.Generator, tools: bool) -> Conversation:
    thinking = bool(random.random() < 0.5)
    return {"messages": messages, "thinking": thinking} | ({"tools": [ADD_TOOL]} if tools else {})


def _seen(text: str) -> str:
    """Returns a number's digits in words: "I see 4, 2 and 7."."""
    *before, last = list(text)
    return f"I see {', '.join(before)} and {last}." if before else f"I see {last}."


def _system(random: np.random.Generator) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _one(random, SYSTEM)}] if random.random() < 0.2 else []


def _user(text: str, pictures: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    if not pictures:
        return {"role": "user", "content": text}
    shown = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _one(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]


def delegate(random: np.random.Generator, together: float = 0.5) -> Conversation:
    """Hands each of several pictures to a sub-agent, as an orchestrator does: all calls at once in a share `together`
    of the conversations, one at a time in the others."""
    names = [f"p{i + 1}" for i in range(int(random.integers(2, 5)))]
    numbers = [number(random) for _ in names]
    messages = [_user(delegated(names))]
    at_once = bool(random.random() < together)
    for some in [range(len(names))] if at_once else [[i] for i in range(len(names))]:
        calls = [
            {
                "id": f"functions.assign_task:{i}",
                "type": "function",
                "function": {
                    "name": "assign_task",
                    "arguments": f'{{"agent": "reader", "prompt": "{names[i]}"}}',
                },
            }
            for i in some
        ]
        messages.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": calls})
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": numbers[i]}
            for i, call in zip(some, calls, strict=True)
        ]
    messages.append({"role": "assistant", "content": listed(numbers), "reasoning_content": ""})
    return {"messages": messages, "thinking": False, "tools": [ASSIGN_TOOL]}


def delegated(names: Sequence[str]) -> str:
    """Returns what an orchestrator is asked about pictures of these names."""
    return f"Read the pictures {' '.join(names)}."


def listed(numbers: Sequence[str]) -> str:
    """Returns the orchestrator's last answer."""
    return f"The numbers are {', '.join(numbers[:-1])} and {numbers[-1]}."
