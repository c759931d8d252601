"""The way from `generate` to the INT4 kernel that docs/architecture.md shows is the code's."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_reader_opens_ten_files_each_of_which_imports_the_next():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## From `generate` to the INT4 kernel", 1)[1].split("\n## ", 1)[0]
    files = re.findall(r"^\d+\. `(\S+\.py)`", section, re.MULTILINE)
    assert 5 <= len(files) <= 10 and files[0] == "kimi_jax/runtime/generate.py"
    for file, following in itertools.pairwise(files):
        *package, module = following.removesuffix(".py").split("/")
        # as a module, or by what its package exports of an `api`
        name = ".".join(package if module == "api" else (*package, module))
        parent = ".".join(package[:-1] if module == "api" else package)
        imported = rf"from {re.escape(name)} import|from {re.escape(parent)} import .*\b{name.rsplit('.', 1)[1]}\b"
        assert re.search(imported, (ROOT / file).read_text()), f"{file} does not import {following}"
    assert "int4" in files[-1] and "pltpu" in (ROOT / files[-1]).read_text()
