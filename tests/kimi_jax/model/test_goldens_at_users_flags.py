"""A golden of each family under the compiler flags that users have; other tests compile without optimisation."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest

# Each list takes a process. A prompt with pictures has text too; K2 is K2.5's attention and Kimi Linear's experts.
QUICK = (("kimi-linear", "text"),)
SLOW = (("k2.5", "prompt"), ("k2.5", "text"), ("k2", "text"))
ATOL = 5e-5  # as in test_goldens.py
SCRIPT = Path(__file__).parents[2] / "support" / "users_flags.py"


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """Returns a function from names and kinds to the logits of all of them, computed in one process: its imports are
    paid once."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = [str(Path(cases.__file__).parent), environment.get("PYTHONPATH", "")]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}

    @functools.cache
    def compute(together):
        destination = tmp_path_factory.mktemp("users_flags") / "logits.npz"
        asked = [part for name, kind in together for part in (str(checkpoint(name)), kind)]
        command = [sys.executable, str(SCRIPT), str(destination), *asked]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(destination) as file:
            return dict(file)

    return compute


@pytest.mark.parametrize(("name", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_logits_of_a_golden(found, name, kind):
    logits = found(QUICK if (name, kind) in QUICK else SLOW)[f"{name} {kind}"]
    np.testing.assert_allclose(logits, cases.golden(name)[f"{kind}_logits"], rtol=0, atol=ATOL)
