"""Bytes that a compiled step moves to and from HBM, from its HLO text.

XLA's own count ("bytes accessed") adds up all memories: what is fetched into a TPU's VMEM before a kernel reads it
there counts three times. Here HBM alone counts. A kernel reads its operands whole, and writes nothing of a result that
is one of them (of a cache, it writes a token's row).
"""

from kimi_jax.plan.hlo import FREE, HloProgram, Instruction, nbytes, result

# These read of their first operand only what they make.
_PARTIAL = frozenset({"gather", "dynamic-slice", "slice"})


def hbm_bytes(program: HloProgram) -> int:
    """Counts the bytes of one run of the entry computation; loops and branches in it count operands and results."""
    entry = program.computations[program.entry]
    return sum(moved_bytes(instruction, entry, program) for instruction in entry.values())


def moved_bytes(instruction: Instruction, entry: dict[str, Instruction], program: HloProgram) -> int:
    """Counts the bytes that one instruction of a computation reads and writes."""
    if instruction.op in FREE or instruction.op.endswith(("-done", "-update")):
        return 0
    made = nbytes(result(instruction), hbm_only=True)
    sources = [entry[name] for name in instruction.operands if name in entry]
    if instruction.op in ("copy-start", "slice-start"):  # between memories
        read = nbytes(result(instruction)) if nbytes(sources[0].shape, hbm_only=True) else 0
        return read + made
    if "output_to_operand_aliasing" in instruction.attributes:
        return max(0, sum(nbytes(source.shape, hbm_only=True) for source in sources) - made)
    if instruction.op == "dynamic-update-slice":  # in place: what has to be copied first, XLA has copied
        slice_ = sources[1].shape
        return (nbytes(slice_) if made else 0) + nbytes(slice_, hbm_only=True)
    if instruction.op in _PARTIAL:
        return made + min(made, nbytes(sources[0].shape, hbm_only=True))
    return made + sum(read_bytes(source, i, instruction, program) for i, source in enumerate(sources))


def read_bytes(source: Instruction, number: int, reader: Instruction, program: HloProgram) -> int:
    """Counts the bytes of its operand that an instruction reads: all, except where a fusion only picks some."""
    whole = nbytes(source.shape, hbm_only=True)
    if reader.op != "fusion" or not whole:
        return whole
    body = program.computations[reader.called[0]]
    (name,) = (one.name for one in body.values() if one.op == "parameter" and one.operands == (str(number),))
    picked = 0
    for user in body.values():
        if name in user.operands:
            if user.op not in _PARTIAL or user.operands[0] != name:
                return whole
            picked += nbytes(user.shape)
    return min(whole, picked)
