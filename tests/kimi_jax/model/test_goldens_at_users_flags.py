"""A golden of each family under the compiler flags that users have; other tests compile without optimisation."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest

FAMILIES = ["k2", "k2.5", "kimi-linear"]
ATOL = 5e-5  # as in test_goldens.py
SCRIPT = Path(__file__).parents[2] / "support" / "users_flags.py"


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """Returns the logits of all families, computed in one process: its imports are paid once."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = [str(Path(cases.__file__).parent), environment.get("PYTHONPATH", "")]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    destination = tmp_path_factory.mktemp("users_flags") / "logits.npz"
    command = [sys.executable, str(SCRIPT), str(destination), *(str(checkpoint(name)) for name in FAMILIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(destination) as file:
        return dict(file)


@pytest.mark.parametrize(("name", "kind"), [*((name, "text") for name in FAMILIES), ("k2.5", "prompt")])
def test_logits_of_a_golden(found, name, kind):
    np.testing.assert_allclose(found[f"{name} {kind}"], cases.golden(name)[f"{kind}_logits"], rtol=0, atol=ATOL)
