"""Runs `kimi-jax env`, which shows what a report of a fault needs: versions, devices, memory, settings."""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kimi_jax.cli.terminal import print_line

NAME = "env"
SUMMARY = (
    "Show versions, devices, memory and settings: what a report of a fault needs. Nothing is sent anywhere, and no key "
    "is shown."
)
EXAMPLE = "kimi-jax env\n  kimi-jax env --json\n  JAX_PLATFORMS=cpu kimi-jax env"

PACKAGES = ("kimi-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "optax", "tiktoken", "pillow", "rich")
# Installed on some machines only.
EXTRAS = ("libtpu", "jax-cuda13-plugin", "openai", "starlette", "uvicorn", "llguidance")
# Settings of JAX and of XLA change what runs; others may be secrets.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    found = describe()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        lines = [f"{key}: {one}" for key, one in value.items()] if isinstance(value, dict) else [str(value)]
        print_line(f"{name}: {lines[0] if len(lines) == 1 else ''}".rstrip())
        for line in lines if len(lines) != 1 else ():
            print_line(f"  {line}")


def describe() -> dict[str, Any]:
    """Returns names and values, each a text or a dictionary of texts."""
    versions = {name: found for name in (*PACKAGES, *EXTRAS) if (found := _version(name)) is not None}
    memory = {line.split(":")[0]: line.split(":")[1].strip() for line in _lines("/proc/meminfo")}
    return {
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
        "packages": versions,
        "cpus": str(os.cpu_count()),
        "memory": {name: memory[name] for name in ("MemTotal", "MemAvailable") if name in memory},
        "devices": _devices(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _devices() -> dict[str, str]:
    """Returns the devices that JAX finds here, with their memory where they say it; an error is the answer, too."""
    import jax

    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        return {"none": str(error)}
    found = {}
    for device in devices:
        stats = device.memory_stats() or {}
        limit = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
        found[str(device)] = f"{device.device_kind}{limit}"
    return found
