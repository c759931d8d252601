"""Refuses docstrings that begin as a fragment: a docstring is a sentence, or begins with the noun that it is about.

`make lint` runs this. It reads the folders of `CHECKED`; those of `TO_COME` move there as they are put into sentences.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKED = ("checkpoints", "kimi_jax/plan", "pallas_kernels", "sharding")
TO_COME = ("benchmarks", "kimi_jax", "tests")
# A relative clause or a preposition without the noun that it needs.
FRAGMENTS = frozenset(["as", "how", "of", "than", "that", "those", "what", "when", "whether", "which", "who", "whose"])


def fragments(path: Path) -> Iterator[str]:
    """Lists the docstrings of a module that begin as a fragment, each as "path:line: first line"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and text.split()[0].strip(",.:;").lower() in FRAGMENTS:
            line = node.body[0].lineno
            yield f"{path}:{line}: a docstring that begins as a fragment: {text.splitlines()[0]}"


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    folders = sys.argv[1:] or CHECKED
    found = [line for folder in folders for path in sorted((root / folder).rglob("*.py")) for line in fragments(path)]
    print("\n".join(found) or f"docstrings of {', '.join(folders)} are whole sentences")
    sys.exit(bool(found))
