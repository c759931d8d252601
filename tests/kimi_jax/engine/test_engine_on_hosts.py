"""An engine on two processes answers as in one: pictures, pages over data shards and `sequence`, copies of states."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cases
import engine_of_several
import pytest

from checkpoints.toy import head_config, write_toy

SUPPORT = Path(__file__).parents[2] / "support"


# Each compiles a dozen programs in both processes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("k2.5", "1x2x4x1", None),
        ("kimi-linear", "2x2x2x1", None),
        ("k2.5", "2x2x1x2", None),
        ("k2.5", "2x2x2x1", "eagle3-llama"),
    ],
)
def test_two_processes_answer_as_one(two_layer_model, name, shape, kind, tmp_path):
    expected, _ = engine_of_several.answers(two_layer_model(name))
    folder = cases.two_layers(name, tmp_path)
    head = []
    if kind is not None:
        config = json.loads((folder / "config.json").read_text())
        head.append(write_toy(tmp_path / "head", head_config(config, kind)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    path = os.pathsep.join([*sys.path, str(SUPPORT.parent / "golden")])
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "PYTHONPATH": path,
    }
    running = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "engine_of_several.py", folder, shape, coordinator, "2", str(process), *head],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0]
    found, cached = json.loads(outputs[0].splitlines()[-1])
    assert found == expected and cached == 256
