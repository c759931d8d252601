"""The notebooks run as they stand, each in a minute of CPU time and 2 GB, and their claims hold."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
MOST_CPU_S, MOST_KB = 60, 2_000_000
# Runs a command, and prints CPU seconds and kilobytes of it and its kernel. A process of its own: the memory of one
# that is forked counts as its child's, too
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(code)
"""


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda script: script.stem)
def test_a_notebook_names_its_model_once_and_states_claims(script):
    text = script.read_text()
    cells = text.split("\n# %%")[1:]
    assert sum(bool(re.search(r"^MODEL = ", cell, re.MULTILINE)) for cell in cells) == 1
    assert re.fullmatch(r'\nMODEL = "[^"\n]+"( +#.*)?\n*', cells[1])  # a cell of its own, the first of code
    assert text.count("\nassert ") >= 2 and cells[0].startswith(" [markdown]\n# # ")
    assert not re.search(r"^(import|from) (torch|seaborn|plotly|pandas)", text, re.MULTILINE)


@pytest.mark.parametrize(
    "script", [pytest.param(script, id=script.stem, marks=pytest.mark.slow) for script in NOTEBOOKS]
)
@pytest.mark.skipif(importlib.util.find_spec("jupytext") is None, reason="needs kimi-jax[notebooks]")
def test_a_notebook_runs(script, tmp_path):
    notebook = tmp_path / "executed.ipynb"
    command = [sys.executable, "-m", "jupytext", "--quiet", "--to", "ipynb", "--execute", "--output", str(notebook)]
    # As a person runs it: on one device, without what the tests ask of XLA
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, str(script)], env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seconds, kilobytes = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < MOST_CPU_S and kilobytes < MOST_KB
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
