"""The benchmark for a machine with a GPU runs at toy size on a CPU."""

import json

import gpu
import jax.numpy as jnp
import pytest

import pallas_kernels as ops


def test_kernels_are_timed_and_their_bytes_counted(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    assert gpu.main(["--toy", "--part", "kernels", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["toy"] and [line["name"] for line in record["lines"]] == [case.name for case in gpu.TOYS]
    assert all(line["value"] > 0 and line["beside"].endswith(" GB/s") for line in record["lines"])
    assert "mixture, 4 tokens: " in capsys.readouterr().out


def test_a_mixture_moves_the_experts_that_a_token_chose():
    # Given two tokens that chose three of four experts, of 64 x 32 weights each in bf16 three times
    chosen, shares = jnp.array([[0, 1], [1, 3]], jnp.int32), jnp.ones((2, 2), jnp.float32)
    up, down = jnp.ones((4, 32, 64), jnp.bfloat16), jnp.ones((4, 64, 32), jnp.bfloat16)
    x = jnp.ones((2, 64), jnp.bfloat16)
    # Then their bytes count, with the tokens', routes' and results'
    expected = 3 * 3 * 64 * 32 * 2 + 2 * 64 * 2 + 2 * (2 * 2 * 4) + 2 * 64 * 2
    assert gpu.nbytes(ops.mixture, (x, chosen, shares, up, up, down), x) == expected


@pytest.mark.slow
def test_a_whole_run_at_toy_size(capsys):
    assert gpu.main(["--toy"]) == 0
    said = capsys.readouterr().out
    assert "goldens: kimi-linear: " in said and "100% of greedy tokens are the same" in said
    assert "decode: 2 rows, kimi-jax: " in said
