"""Refuses docstrings that begin as a fragment, and functions whose docstring does not begin with a verb.

`make lint` runs this. A docstring is a sentence, or begins with the noun that it is about. That of a public function
begins with a verb in the third person ("Returns ...", "Reads ..."), or refers to the function's description ("See
..."). Properties, tests and what begins with an underscore may begin with a noun.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKED = ("benchmarks", "checkpoints", "kimi_jax", "pallas_kernels", "sharding", "tests")
# A relative clause or a preposition without the noun that it needs.
FRAGMENTS = frozenset(
    ["as", "how", "of", "than", "that", "those", "what", "when", "where", "whether", "which", "who", "whose", "why"]
)
# English verbs in the third person end in s, so that no list of them is needed.
_VERB = re.compile(r"[A-Z][a-z-]*s\b|See\b")


def complaints(path: Path) -> Iterator[str]:
    """Yields a line, "path:line: reason: first line", for each docstring of a module that is refused."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        reason = ""
        if text.split()[0].strip(",.:;").lower() in FRAGMENTS:
            reason = "a docstring that begins as a fragment"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _needs_verb(node) and not _VERB.match(text):
            reason = "the docstring of a function that does not begin with a verb"
        if reason:
            yield f"{path}:{node.body[0].lineno}: {reason}: {text.splitlines()[0]}"


def _needs_verb(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return not function.name.startswith(("_", "test_")) and not any(name.endswith("property") for name in decorators)


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    folders = sys.argv[1:] or CHECKED
    lines = [line for folder in folders for path in sorted((root / folder).rglob("*.py")) for line in complaints(path)]
    print("\n".join(lines) or f"docstrings of {', '.join(folders)} are whole sentences")
    sys.exit(bool(lines))
