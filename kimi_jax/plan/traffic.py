"""Messages of a compiled step, and the weights that it moves or copies, from its HLO text."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_jax.plan.hlo import FREE, HloProgram, nbytes, result, rows

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
         "reduce-scatter")  # fmt: skip
# A norm's scale in another dtype is no copy worth a word; an expert's projection has megabytes.
COPY_BYTES = 2**20
# A mesh with named axes, the order of its devices, and the axes in which those of a group differ
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')


@dataclass(frozen=True, order=True)
class Collective:
    """Alike messages of a step: `count` times an operand of `nbytes` on each device, among devices that differ in mesh
    `axes`, `group` of them. `in_loop`: in a loop of unknown length, of which `count` has one turn."""

    kind: str
    axes: tuple[str, ...]
    group: int
    nbytes: int
    count: int
    in_loop: bool = False
    to_all: bool = False

    @property
    def sent(self) -> float:
        """The least bytes that a device has to send for all of these messages."""
        share = (self.group - 1) / self.group
        each = {"all-reduce": 2 * share, "all-gather": self.group - 1, "collective-permute": 1}.get(self.kind, share)
        each = self.group - 1 if self.to_all else each
        return float(self.count * self.nbytes * each)


def ragged_operand(operands: Sequence[int], rows: int) -> tuple[int, bool]:
    """Returns the most bytes that a device's ragged message has, and whether all of them go to every other device.

    `operands` are the operands' sizes: those of the source, whose number of rows is `rows`, and of the room that is
    filled; the others are offsets. The bytes are the source's or, where it is smaller, the room's. A source of one row
    cannot be shared out: it goes to all (`sharding.page_ring.gather_ragged`). Rows of others go to one device each.
    """
    return min(operands[:2]), rows == 1


def collectives(program: HloProgram, mesh: dict[str, int]) -> list[Collective]:
    """Lists a program's messages, the largest first, for devices numbered along `mesh`'s axes, the last fastest.

    One that the compiler cuts up, to send while it multiplies, stands in several fusions, which share a `chain_id`.
    """
    found: Counter[tuple[str, tuple[str, ...], int, int, bool, bool]] = Counter()
    chains: set[str] = set()
    for body, instruction, times, in_loop in program.counted():
        kind = instruction.op.removesuffix("-start")
        chain = _CHAIN.search(instruction.attributes)
        if kind in KINDS and not (chain and chain[1] in chains):
            chains |= {chain[1]} if chain else set()
            axes, group = _axes(instruction.attributes, mesh)
            shapes = [body[name].shape for name in instruction.operands if name in body]
            operand, to_all = sum(map(nbytes, shapes)), False
            if kind == "ragged-all-to-all":
                operand, to_all = ragged_operand([*map(nbytes, shapes)], rows(shapes[0]))
            if group > 1:
                found[kind, axes, group, operand, in_loop, to_all] += times
    listed = [Collective(*what[:4], count, *what[4:]) for what, count in found.items()]
    return sorted(listed, key=lambda collective: (-collective.count * collective.nbytes, collective))


def _axes(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes in which the devices of a group differ, and the number of these devices."""
    groups = _groups(attributes, int(np.prod(list(mesh.values()))))
    at = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)  # [groups, members, axes]
    differ = (at != at[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, varies in zip(mesh, differ, strict=True) if varies)
    return axes, int(np.prod([mesh[axis] for axis in axes])) if "source_target_pairs" in attributes else groups.shape[1]


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Returns device numbers, [groups, members]; pairs of a permutation count as groups of two."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = _numbers(iota[1]), _numbers(iota[2])
        order = np.arange(np.prod(dims)).reshape(dims)
        return (order.transpose(_numbers(iota[3])) if iota[3] else order).reshape(shape)
    if named := _NAMED.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        order = np.arange(devices)
        if named[3]:  # the mesh's devices are not in order
            order = order.reshape(_numbers(named[2])).transpose(_numbers(named[3]))
        order = order.reshape(list(sizes.values()))
        return np.moveaxis(order, last, range(-len(last), 0)).reshape(-1, int(np.prod([order.shape[i] for i in last])))
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(devices)[None]
    raise ValueError(f"replica groups of an unknown form: {attributes[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


@dataclass(frozen=True)
class MovedWeight:
    """An instruction that sends weights (`how` is its kind), or writes them to HBM once more (`how` is "copy")."""

    how: str
    instruction: str
    nbytes: int


def moved_weights(program: HloProgram, mark: str) -> list[MovedWeight]:
    """Lists the instructions that move or copy weights, the arguments whose `op_name` begins
    with what the regular expression `mark` matches.

    Copies into VMEM are how a TPU reads, and do not count.
    """
    ours = program.weight_names(mark)
    found = []
    for instruction in program.computations[program.entry].values():
        if instruction.name not in ours or instruction.op in FREE or instruction.op.endswith(("-done", "-update")):
            continue
        kind = instruction.op.removesuffix("-start")
        size = nbytes(result(instruction), hbm_only=True)
        if kind in KINDS:
            found.append(MovedWeight(kind, instruction.name, nbytes(result(instruction))))
        elif size >= COPY_BYTES:
            found.append(MovedWeight("copy", instruction.name, size))
    return found
