"""The import contracts in pyproject.toml name the same modules, so that none escapes the order of the packages."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_the_order_of_packages_names_every_module_of_kimi_jax():
    packages, inside, *_ = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    assert inside["containers"] == ["kimi_jax"] and inside["exhaustive"]
    listed = re.findall(r"kimi_jax\.(\w+)", " ".join(packages["layers"]))
    assert sorted(listed) == sorted(re.findall(r"\w+", " ".join(inside["layers"])))
