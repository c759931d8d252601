"""Reads the text of a compiled program: its instructions, how often each runs, and which depend on weights alone.

The text is XLA's own (`compiled.as_text()`); https://openxla.org/xla/operation_semantics names the operations.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# These make a name for what is there, and move nothing.
FREE = frozenset({"parameter", "bitcast", "tuple", "get-tuple-element", "constant", "optimization-barrier"})


@dataclass(frozen=True)
class Instruction:
    """`shape` and `attributes` are XLA's text; `operands` are names in the same computation, and for a parameter its
    number."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """The names of the computations that this instruction runs."""
        branches = ",".join(_BRANCHES.findall(self.attributes))
        return _CALLED.findall(self.attributes) + [name.strip(" %") for name in branches.split(",") if name]


@dataclass(frozen=True)
class HloProgram:
    """`computations` by name, each with its instructions by name, in order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def counted(self) -> Iterator[tuple[dict[str, Instruction], Instruction, int, bool]]:
        """Yields every instruction: (its computation, itself, how often it runs at most, whether in a loop of unknown
        length).

        A loop whose length the program does not state counts one turn; all branches of a conditional count.
        """
        todo = [(self.entry, 1, False)]
        while todo:
            name, times, open_ended = todo.pop()
            for instruction in (body := self.computations[name]).values():
                yield body, instruction, times, open_ended
                turns = _TRIPS.search(instruction.attributes) if instruction.op == "while" else None
                unknown = instruction.op == "while" and turns is None
                if instruction.op.endswith(("-done", "-update")):  # what was started is counted there
                    continue
                for called in instruction.called:
                    todo.append((called, times * (int(turns[1]) if turns else 1), open_ended or unknown))

    def weight_names(self, mark: str) -> set[str]:
        """Lists the names in the entry computation that depend on parameters whose `op_name` begins with what the
        regular expression `mark` matches, and on no other parameters."""
        found: dict[str, bool | None] = {}  # None: on constants alone
        for instruction in self.computations[self.entry].values():
            if instruction.op == "parameter":
                found[instruction.name] = re.search(f'op_name="{mark}', instruction.attributes) is not None
                continue
            kinds = {found.get(name) for name in instruction.operands} - {None}
            found[instruction.name] = kinds == {True} if kinds else None
        return {name for name, whole in found.items() if whole}


def parse(text: str) -> HloProgram:
    """Parses the text of a program. Raises ValueError where it has no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}  # type: tuple[str, dict[str, Instruction]]
    for line in text.splitlines():
        if line[:1] not in (" ", "}", "") and (head := _COMPUTATION.match(line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[1], match[2])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation")
    return HloProgram(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    op, inside = rest[:begin], rest[begin + 1 : close]
    operands = (inside,) if op == "parameter" else tuple(_NAME.findall(inside))
    return Instruction(name, shape, op, operands, rest[close + 1 :])


def _closing(text: str, begin: int) -> int:
    """Finds the bracket that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def small_cycles(program: HloProgram) -> int:
    """Adds up the cycles that the compiler expects of the entry computation's small operations.

    It writes no estimate for kernels, messages, sorts, gathers and loops: they count nothing here.
    """
    found = (_CYCLES.search(one.attributes) for one in program.computations[program.entry].values())
    cycles = (int(one[1]) for one in found if one)
    return sum(count for count in cycles if count < 2**62)  # more stands for not known


def result(instruction: Instruction) -> str:
    """Returns the shape of an instruction's result: for a start's (source, destination, ...) tuple, the destination."""
    if not instruction.op.endswith("-start") or not instruction.shape.startswith("("):
        return instruction.shape
    arrays = re.findall(r"[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?", instruction.shape)
    # only a copy's comes first
    return arrays[0] if instruction.op == "copy-start" else arrays[min(1, len(arrays) - 1)]


def nbytes(shape: str, *, hbm_only: bool = False) -> int:
    """Counts the bytes of all arrays of a shape, tuples added up; INT4 counts half a byte.

    `hbm_only` leaves out arrays in another memory, such as a TPU's VMEM, `S(1)`.
    """
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype == "token" or (hbm_only and re.search(r"S\([1-9]", layout)):
            continue
        width = re.search(r"\d+", dtype)
        bits = 8 if width is None else int(width[0])  # pred has none
        total += math.prod(int(n.strip("<=")) for n in dims.split(",") if n) * bits // 8
    return total


def rows(shape: str) -> int:
    """Returns an array's first dimension. Raises ValueError where it has none."""
    found = _ARRAY.search(shape)
    if found is None or not found[2]:
        raise ValueError(f"a shape is {shape!r}, expected an array with at least one dimension")
    return int(found[2].split(",")[0].strip("<="))
