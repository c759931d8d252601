"""The Python tool: an interpreter of its own for each conversation, in a box, whose names live from call to call."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from kimi_jax.agents.box import Kind, find_box
from kimi_jax.agents.python_process import Interpreter
from kimi_jax.agents.tools import Tool

DESCRIPTION = (
    "Run Python code in an interpreter that keeps its names from call to call. Returns what is printed, the value of "
    "the last expression, and figures of matplotlib. There is no network, and no file but those in the working folder."
)


def python(*, timeout: float = 60.0, unsafe: bool = False) -> Tool:
    """Returns the tool `python(code)`, which asks for a person's yes.

    timeout: seconds of a call; a longer one ends the interpreter, and the next call gets a new one.
    unsafe: allows to run without a box where none works; then the code can do all that this process can.

    Raises RuntimeError where no box works on this machine, and says why, unless `unsafe`.
    """
    kind, reason = find_box()
    if kind == "none" and not unsafe:
        raise RuntimeError(f"no box for a model's Python code works here, and unsafe is not given: {reason}")
    schema = {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    return Tool("python", DESCRIPTION, schema, lambda: _open(kind), timeout=timeout, asks=True, opens=True)


@contextlib.asynccontextmanager
async def _open(kind: Kind) -> AsyncIterator[Callable[[str], Any]]:
    interpreter = Interpreter(kind)
    try:
        yield interpreter.run
    finally:
        await interpreter.close()
