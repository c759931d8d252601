"""Bytes that a program compiled for a GPU moves to and from memory, from its HLO text.

Every operand is read from memory and every result written, as `kimi_jax.plan.hbm` counts them, in loops as often as
they turn. A kernel that visits groups reads the matrices of as many groups as it has visits, at most all: visits of
one group follow one another, and the later ones find its tiles in the second-level cache. A scatter, and an update of a
slice, writes what is new.
"""

import re
from collections.abc import Iterator

from kimi_jax.plan.hbm import moved_bytes, read_bytes
from kimi_jax.plan.hlo import HloProgram, Instruction, nbytes

KERNEL = "__gpu$xla.gpu.triton"
_NAME = re.compile(r', name = "([^"]+)"')
_GRID = re.compile(r"grid_([xyz]) = (\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_VISITING = frozenset({"grouped_matmul", "grouped_glu", "mixture_glu", "mixture_down"})
_BODIES = frozenset({"while", "conditional", "call"})


def kernels(program: HloProgram) -> list[str]:
    """Lists the names of the Pallas kernels that a program calls, each as often as it stands there."""
    return [name for _, instruction, _ in _run(program) if (name := kernel_name(instruction))]


def kernel_name(instruction: Instruction) -> str | None:
    """Returns the name of the Pallas kernel that an instruction calls, None for another instruction."""
    if instruction.op != "custom-call" or KERNEL not in instruction.attributes:
        return None
    return _NAME.findall(instruction.attributes)[-1]


def memory_bytes(program: HloProgram) -> int:
    """Counts the bytes of one run. Of a loop whose length depends on values one turn counts."""
    return sum(times * _moved(instruction, body, program) for body, instruction, times in _run(program))


def largest(program: HloProgram, count: int) -> list[tuple[int, str]]:
    """Lists the instructions that move most, with their bytes."""
    found = [
        (times * _moved(instruction, body, program), f"{kernel_name(instruction) or instruction.name} {times}x")
        for body, instruction, times in _run(program)
    ]
    return sorted(found, reverse=True)[:count]


def _run(program: HloProgram) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """Yields the instructions that are run one by one, each with its computation and how often."""
    todo = [(program.entry, 1)]
    while todo:
        name, times = todo.pop()
        for instruction in (body := program.computations[name]).values():
            if instruction.op in _BODIES:
                turns = _TRIPS.search(instruction.attributes)
                todo += [(called, times * (int(turns[1]) if turns else 1)) for called in instruction.called]
            else:
                yield body, instruction, times


def _moved(instruction: Instruction, body: dict[str, Instruction], program: HloProgram) -> int:
    name = kernel_name(instruction)
    if name in _VISITING:
        return _visited(instruction, body)
    if instruction.op == "fusion":
        return _fused(instruction, body, program)
    return moved_bytes(instruction, body, program)


def _visited(instruction: Instruction, body: dict[str, Instruction]) -> int:
    sources = [body[name].shape for name in instruction.operands]
    visits = int(dict(_GRID.findall(instruction.attributes))["y"])
    total = nbytes(instruction.shape)
    for shape in sources:
        dims = re.search(r"\[([\d,]*)\]", shape)
        sizes = [int(n) for n in dims[1].split(",") if n] if dims else []
        groups = sizes[0] if len(sizes) == 3 else 0  # of a stack of matrices
        total += nbytes(shape) * min(visits, groups) // groups if groups else nbytes(shape)
    return total


def _fused(instruction: Instruction, body: dict[str, Instruction], program: HloProgram) -> int:
    inside = program.computations[instruction.called[0]]
    root = list(inside.values())[-1]
    written, in_place = 0, set()
    for result in [inside[name] for name in root.operands] if root.op == "tuple" else [root]:
        made = _behind_bitcasts(result, inside)
        if made.op in ("scatter", "dynamic-update-slice"):
            target = _behind_bitcasts(inside[made.operands[0]], inside)
            written += nbytes(inside[made.operands[2 if made.op == "scatter" else 1]].shape)
            in_place |= set(target.operands) if target.op == "parameter" else set()
        else:
            written += nbytes(result.shape)
    sources = [body[name] for name in instruction.operands]
    return written + sum(
        read_bytes(source, i, instruction, program) for i, source in enumerate(sources) if str(i) not in in_place
    )


def _behind_bitcasts(instruction: Instruction, body: dict[str, Instruction]) -> Instruction:
    while instruction.op == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction
