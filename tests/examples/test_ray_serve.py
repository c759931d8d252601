"""examples/ray_serve.py answers by two replicas, and a prompt that came before goes where its beginning is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.toy import toy_config, write_toy

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"


# Starts Ray, and compiles an engine in each replica.
@pytest.mark.slow
def test_two_replicas_answer_alike(tmp_path):
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed, and no dependency of the package")
    folder = write_toy(tmp_path / "k2", toy_config("k2", num_hidden_layers=1, first_k_dense_replace=0))
    options = ["--max-new-tokens", "8", "--slots", "1", "--prefill-chunk", "16", "--cache-memory", "4MiB"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1]), "RAY_USAGE_STATS_ENABLED": "0"}
    ran = subprocess.run(
        [sys.executable, EXAMPLE, folder, "Hello", "Hello", "Go on", "Tell me more", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 4 and results[0]["content"] == results[1]["content"] != results[2]["content"]
    assert len({result["replica"] for result in results}) == 2
