"""Small Kimis that are trained, as data of this package: published folders that every command takes.

"k25-digits" reads handwritten digits in pictures and adds numbers by calling a tool, in Kimi K2.5's published layout.
"kimi-linear-small" copies, recalls and adds in text, in Kimi Linear's. Each folder has a model card, README.md.
"""

from pathlib import Path
from typing import Any

NAMES = ("k25-digits", "kimi-linear-small")

# The tool that k25-digits was trained to call, in OpenAI's schema.
ADD_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}

# The tool by which an orchestrator hands a picture to a sub-agent (`benchmarks/parl.py`); k25-digits is not trained to
# call it, but its tokenizer has its words.
ASSIGN_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "assign_task",
        "description": "Give a task to a sub-agent.",
        "parameters": {
            "type": "object",
            "properties": {"agent": {"type": "string"}, "prompt": {"type": "string"}},
            "required": ["agent", "prompt"],
        },
    },
}


def path(name: str) -> Path:
    """Returns the folder of a small model, one of `NAMES`. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"small model {name!r}: expected one of {', '.join(NAMES)}")
    return Path(__file__).parent / name


def picture(number: str) -> Path:
    """Returns the file of a picture of a number in handwritten digits that k25-digits was not trained on: "427" for
    instance. Raises FileNotFoundError naming those that there are."""
    folder = Path(__file__).parent / "pictures"
    if (file := folder / f"{number}.png").is_file():
        return file
    there = ", ".join(sorted(one.stem for one in folder.glob("*.png")))
    raise FileNotFoundError(f"no picture of {number!r}, but of {there}")
