"""A golden of each family under the compiler flags that users have; other tests compile without optimisation."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest

# Each list takes a process. K2 is K2.5's attention and Kimi Linear's experts.
TOGETHER = (("k2.5", "kimi-linear"), ("k2",))
ATOL = 5e-5  # as in test_goldens.py
SCRIPT = Path(__file__).parents[2] / "support" / "users_flags.py"


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """Returns a function from names to the logits of all of them, computed in one process: its imports are paid
    once."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = [str(Path(cases.__file__).parent), environment.get("PYTHONPATH", "")]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}

    @functools.cache
    def compute(names):
        destination = tmp_path_factory.mktemp("users_flags") / "logits.npz"
        command = [sys.executable, str(SCRIPT), str(destination), *(str(checkpoint(name)) for name in names)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(destination) as file:
            return dict(file)

    return compute


@pytest.mark.parametrize(
    ("name", "kind"),
    [("k2.5", "text"), ("k2.5", "prompt"), ("kimi-linear", "text"), pytest.param("k2", "text", marks=pytest.mark.slow)],
)
def test_logits_of_a_golden(found, name, kind):
    (names,) = (names for names in TOGETHER if name in names)
    expected = cases.golden(name)[f"{kind}_logits"]
    np.testing.assert_allclose(found(names)[f"{name} {kind}"], expected, rtol=0, atol=ATOL)
