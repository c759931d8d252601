"""One checkpoint under several `rope_parameters`, against transformers' logits (`tests/golden/make_rope.py`)."""

import json
import shutil

import cases
import jax.numpy as jnp
import numpy as np
import pytest

import kimi_jax
from kimi_jax.config_json import from_folder

ATOL = 5e-5  # the tolerance of the other goldens; the reference's own float32 error is 6e-6


@pytest.fixture
def respelt(checkpoint, tmp_path):
    """Returns a function from a case to the "k2" checkpoint with that case's `rope_parameters` in place of rope_theta
    and rope_scaling."""

    def write(case):
        folder = shutil.copytree(checkpoint("k2"), tmp_path / case)
        config = json.loads((folder / "config.json").read_text())
        del config["rope_scaling"], config["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": cases.ROPE_PARAMETERS[case]}))
        return folder

    return write


def test_the_new_spelling_is_the_old_configuration(checkpoint, respelt):
    assert from_folder(respelt("released")) == from_folder(checkpoint("k2"))


@pytest.mark.parametrize(("number", "case"), list(enumerate(cases.ROPE_PARAMETERS)))
def test_logits(respelt, number, case):
    k2, golden = cases.golden("k2"), cases.golden("rope")["logits"]
    logits = kimi_jax.load(respelt(case), dtype=jnp.float32)(jnp.asarray(k2["text_tokens"][:1]))
    found = np.asarray(logits)[0, k2["text_positions"][0]]
    np.testing.assert_allclose(found, golden[number], rtol=0, atol=ATOL)


def test_the_cases_differ_by_far_more_than_the_tolerance():
    golden = cases.golden("rope")["logits"]
    gaps = np.abs(golden[:, None] - golden).max((2, 3)) + np.eye(len(golden))
    assert len(golden) == len(cases.ROPE_PARAMETERS) and gaps.min() > 0.01
    np.testing.assert_array_equal(golden[0], cases.golden("k2")["text_logits"][0])
