"""Compiles kernels for a GPU that this machine does not have, and reads registers, spills and shared memory.

XLA writes each kernel's PTX and the list of its launches into a folder; the assembler, `ptxas`, says the rest.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

_LAUNCH = re.compile(r"kCustomKernel.*?\] (\w+) grid: .* shared_memory: (\d+) bytes")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class KernelCase:
    """A call whose kernels are held to a budget: a name, and what returns the function and its ShapeDtypeStructs."""

    name: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: registers of a thread, bytes that it spills and loads again, bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_case(case: KernelCase, device: Any, folder: Path) -> dict[str, Kernel]:
    """Returns the Pallas kernels of a case by name; `folder` is where XLA dumps, as `--xla_dump_to` says, and empty.

    Raises ValueError where the call has no Pallas kernel.
    """
    place = SingleDeviceSharding(device)
    function, arguments = case.build()
    placed = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place), arguments)
    lowered = jax.jit(lambda *arrays: function(*arrays)).trace(*placed).lower(lowering_platforms=("cuda",))
    names = set(re.findall(r'name = "(\w+)", num_stages', lowered.as_text()))
    lowered.compile()
    text = next(iter(folder.glob("*thunk_sequence.txt"))).read_text()
    shared = {name: int(size) for name, size in _LAUNCH.findall(text) if name in names}
    if not shared:
        raise ValueError(f"{case.name}: no Pallas kernel is launched, expected one of {sorted(names)}")
    found = {}
    for path in folder.glob("*.ptx"):
        entry = re.search(r"\.entry (\w+)", path.read_text())
        if entry and entry[1] in shared:
            found[entry[1]] = _assemble(path, shared[entry[1]])
    return found


def _assemble(path: Path, shared: int) -> Kernel:
    target = re.search(r"^\.target (\w+)", path.read_text(), re.MULTILINE)
    assert target is not None
    command = ["ptxas", "-v", f"-arch={target[1]}", str(path), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills, registers = _SPILLS.search(said), _REGISTERS.search(said)
    assert spills is not None and registers is not None
    return Kernel(int(registers[1]), sum(map(int, spills.groups())), shared)
