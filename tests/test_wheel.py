"""The wheel, built and installed into a fresh environment, works away from the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("checkpoints", "kimi_jax", "pallas_kernels", "sharding")
MOST_BYTES = 12_000_000
MOST_ENVIRONMENT_BYTES = 900_000_000


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_demonstrates_converts_talks_and_serves(tmp_path):
    source, environment = tmp_path / "source", tmp_path / "environment"
    for name in PACKAGES:  # a copy, so that nothing that an earlier build left behind is in the wheel
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_"))}

    def run(*command: object, **options: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("kimi_jax-*.whl")
    assert wheel.stat().st_size < MOST_BYTES
    run(sys.executable, "-m", "venv", environment)
    python, command = environment / "bin" / "python", environment / "bin" / "kimi-jax"
    run(python, *pip, "install", wheel)
    files = (file for file in environment.rglob("*") if file.is_file() and not file.is_symlink())
    assert sum(file.stat().st_size for file in files) < MOST_ENVIRONMENT_BYTES

    home = run(python, "-c", "import kimi_jax; print(kimi_jax.__file__)").strip()
    assert Path(home).is_relative_to(environment)
    assert "thinks: I see 4, 2 and 7." in run(command, "demo", "--keep", tmp_path / "kept")
    run(command, "convert", Path(home).parent / "small" / "kimi-linear-small", tmp_path / "linear")
    assert run(command, "chat", tmp_path / "linear", "--greedy", input="Add 12 and 30.\n").strip()

    run(python, *pip, "install", f"{wheel}[serve]")
    serving = [str(command), "serve", str(tmp_path / "linear"), "--port", "0", "--slots", "1", "--prefill-chunk", "16"]
    with subprocess.Popen(serving, cwd=tmp_path, env=clean, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.fullmatch(r"serving linear at (\S+)\n", server.stdout.readline())
            assert url is not None
            with urllib.request.urlopen(f"{url[1]}/models") as answer:
                assert json.load(answer)["data"][0]["id"] == "linear"
            with urllib.request.urlopen(url[1].removesuffix("/v1")) as page:
                assert b"<html" in page.read()
        finally:
            server.terminate()
    assert server.returncode in (0, 143)
