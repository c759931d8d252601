"""Compiles steps of Kimi Linear and K2.5's vision tower for one GPU that this machine does not have.

    python benchmarks/gpu_compile.py                                # decode of 1, 4 and 32 rows and prefill, both forms
    python benchmarks/gpu_compile.py --chip h200 --format int4 --rows 32 --layers 5 --largest 20
    python benchmarks/gpu_compile.py --vision                       # K2.5's vision tower, an image of 4,096 patches
    python benchmarks/gpu_compile.py --check                        # exit code 1 where a step is above the limits

Layers are at full width. `needed` are the bytes that a step has to read and write once: weights, of which experts as
many as its tokens may choose, the cache, and in a prefill the inputs and outputs of each product. `moved` is counted in
the compiled program (`kimi_jax.plan.gpu_traffic`). Of the tower weights, patches and embeddings are needed.
Compiled, not run: it knows no time. Needs the extra `gpu-compile`.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# Before JAX is imported, which would look for a driver otherwise
os.environ["JAX_PLATFORMS"] = "cpu"

from kimi_jax.plan import gpu_target  # noqa: E402

try:
    os.environ |= gpu_target.environment()
except ValueError as error:
    sys.exit(f"{Path(__file__).name}: {error}")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from kimi_jax import config_json  # noqa: E402
from kimi_jax.config import KimiConfig  # noqa: E402
from kimi_jax.model.context import PAGE  # noqa: E402
from kimi_jax.model.kimi import Kimi, _encode, abstract  # noqa: E402
from kimi_jax.model.vision_layout import lay_out_patches  # noqa: E402
from kimi_jax.plan.gpu_traffic import kernels, largest, memory_bytes  # noqa: E402
from kimi_jax.plan.hlo import parse  # noqa: E402
from kimi_jax.plan.job import bits  # noqa: E402
from kimi_jax.plan.traffic import MovedWeight, moved_weights  # noqa: E402
from kimi_jax.runtime.program import Program  # noqa: E402
from pallas_kernels.hardware import GPUS  # noqa: E402
from sharding import make_mesh  # noqa: E402
from sharding.topologies import topology  # noqa: E402

# The most that a step may move over what it needs, and the most temporaries. Of the tower, whose attention is plain
# JAX, temporaries alone are held; one layer's scores of all patches would take 537 MB in bf16.
LIMIT = {"decode": 1.3, "prefill": 1.3}
TEMPORARIES = {"decode": 200e6, "prefill": 1e9, "vision": 200e6}
SIDE = 64  # patches of the image's height, and of its width


@dataclasses.dataclass(frozen=True)
class Row:
    """A compiled program: bytes that it needs, moves and holds for itself, and experts' weights that it copies."""

    name: str
    phase: str
    needed: int
    moved: int
    temporaries: int
    copies: tuple[MovedWeight, ...]
    kernels: tuple[str, ...]
    largest: tuple[tuple[int, str], ...]
    seconds: float

    @property
    def ratio(self) -> float:
        return self.moved / self.needed

    @property
    def excess(self) -> str | None:
        """A line that says what is above the limits, None where nothing is."""
        most = LIMIT.get(self.phase, math.inf)
        found = [f"moves {self.ratio:.2f} x what it needs, expected at most {most}"] if self.ratio > most else []
        if self.temporaries > TEMPORARIES[self.phase]:
            found += [f"{self.temporaries:,} bytes of temporaries, expected at most {TEMPORARIES[self.phase]:,.0f}"]
        found += [f"copies experts: {copy.instruction}, {copy.nbytes:,} bytes" for copy in self.copies]
        return f"{self.name}: {'; '.join(found)}" if found else None


def config_of(form: str, layers: int) -> KimiConfig:
    """Returns Kimi Linear of so many layers, with experts of the form "bf16" or "int4"."""
    config = config_json.preset("kimi-linear-48b")
    quantization = config_json.preset("kimi-k2.5").text.quantization if form == "int4" else None
    text = dataclasses.replace(config.text, num_hidden_layers=layers, quantization=quantization)
    return dataclasses.replace(config, text=text)


def needed_bytes(model: Kimi, program: Program, phase: str, rows: int, tokens: int, cache: object) -> int:
    """Counts the bytes that a step has to read and write once."""
    text, wide = model.config.text, 2
    pairs = rows * tokens * text.num_experts_per_tok
    total = 0
    for path, variable in nnx.to_flat_state(nnx.split(model)[1]):
        name, shape = ".".join(map(str, path)), variable.shape
        size = _nbytes(variable)
        if "embed_tokens" in name:
            size = rows * tokens * shape[-1] * wide
        elif ".experts." in name:
            size = size * min(pairs, text.n_routed_experts) // text.n_routed_experts
            if phase == "prefill" and "scales" not in name:
                size += pairs * sum(shape[1:]) * wide
        elif phase == "prefill" and len(shape) == 2 and "lm_head" not in name:
            size += rows * tokens * sum(shape) * wide
        total += size
    states = [leaf for leaf in jax.tree.leaves(cache) if leaf.shape[0] == rows]
    pages = sum(map(_nbytes, jax.tree.leaves(cache))) - sum(map(_nbytes, states))
    # A prefill of no history writes its pages
    return total + 2 * sum(map(_nbytes, states)) + pages


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    size = 1
    for n in array.shape:
        size *= n
    return size * bits(array.dtype) // 8


def measure(chip: str, form: str, layers: int, phase: str, rows: int, tokens: int, context: int) -> Row:
    """Compiles a step of `rows` sequences, `tokens` new ones each, with `context` tokens in the cache."""
    slice_ = topology(f"{chip}:1")
    mesh = make_mesh("1x1x1x1", gpu_target.devices(slice_))
    model = abstract(config_of(form, layers), mesh=mesh)
    program = Program(model)
    pages = -(-context // PAGE)
    cache = program.cache_shapes(rows * pages, rows)
    batch = program.batch_shapes(phase, rows, tokens, pages)
    began = time.perf_counter()
    traced = program.jitted.logits.trace(program.arrays, cache, batch)
    paths = [path for path, _ in nnx.to_flat_state(nnx.split(model)[1])]
    experts = "|".join(str(i) for i, path in enumerate(paths) if "experts" in path)
    needed = needed_bytes(model, program, phase, rows, tokens, cache)
    return _row(f"{chip} {form} {phase} of {rows} x {tokens}", phase, needed, traced, rf"arrays\[({experts})\]", began)


def measure_vision(chip: str) -> Row:
    """Compiles K2.5's vision tower and projector for an image of SIDE x SIDE patches."""
    mesh = make_mesh("1x1x1x1", gpu_target.devices(topology(f"{chip}:1")))
    config = config_json.preset("kimi-k2.5")
    # The text model's layers are not in this program
    model = abstract(dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1)), mesh=mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shape(sizes: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

    where = lay_out_patches(np.array([[1, SIDE, SIDE]], np.int32), config.vision)
    patches = shape((SIDE * SIDE, 3, config.vision.patch_size, config.vision.patch_size), model.dtype)
    began = time.perf_counter()
    given = patches, jax.tree.map(lambda array: shape(array.shape, array.dtype), where)
    traced = _encode.trace(model, *given, model.partition)
    weights = nnx.split(nnx.List([model.vision_tower, model.mm_projector]))[1]
    made = jax.tree.leaves(traced.out_info)
    needed = sum(map(_nbytes, [*jax.tree.leaves(weights), *jax.tree.leaves(given), *made]))
    return _row(f"{chip} vision of {SIDE * SIDE:,} patches", "vision", needed, traced, "(?!)", began)


def _row(name: str, phase: str, needed: int, traced: Any, experts: str, began: float) -> Row:
    """Compiles a traced program; `experts` matches the names of the arguments that are experts' weights."""
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    hlo = parse(compiled.as_text())
    return Row(
        name=name,
        phase=phase,
        needed=needed,
        moved=memory_bytes(hlo),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        copies=tuple(moved_weights(hlo, experts)),
        kernels=tuple(kernels(hlo)),
        largest=tuple(largest(hlo, 60)),
        seconds=time.perf_counter() - began,
    )


def main(arguments: list[str]) -> int:
    """Compiles and prints what the flags ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described = [name for name, gpu in GPUS.items() if gpu.facts is not None]
    parser.add_argument("--chip", default="h100", choices=described, help="a GPU of pallas_kernels.hardware")
    parser.add_argument("--format", action="append", choices=("bf16", "int4"), help="of experts; default both")
    parser.add_argument("--rows", type=int, action="append", help="of a decode step; default 1, 4 and 32")
    parser.add_argument("--context", type=int, default=8192, help="tokens that a decode step's cache holds of each row")
    parser.add_argument("--prefill", type=int, help="tokens of a prefill step, 0 for none (default: 2048)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vision", action="store_true", help="compile K2.5's vision tower")
    parser.add_argument("--largest", type=int, default=0, help="also print what moves most")
    parser.add_argument("--check", action="store_true", help="hold steps to the limits")
    options = parser.parse_args(arguments)
    chosen = options.rows or options.prefill is not None or options.vision
    rows = options.rows if chosen else [1, 4, 32]
    tokens = options.prefill if options.prefill is not None else (0 if chosen else 2048)
    steps = [("decode", count, 1, options.context) for count in rows or ()]
    steps += [("prefill", 1, tokens, tokens)] if tokens else []
    todo = [partial(measure_vision, options.chip)] if options.vision else []
    for form in options.format or ("bf16", "int4"):
        todo += [partial(measure, options.chip, form, options.layers, *step) for step in steps]
    complaints = []
    print(f"{'step':32} {'needed GB':>10} {'moved GB':>10} {'ratio':>6} {'temporaries MB':>15} {'seconds':>8}")
    for compile_one in todo:
        row = compile_one()
        print(
            f"{row.name:32} {row.needed / 1e9:10.3f} {row.moved / 1e9:10.3f} {row.ratio:6.2f} "
            f"{row.temporaries / 1e6:15.1f} {row.seconds:8.0f}",
            flush=True,
        )
        for size, name in row.largest[: options.largest]:
            print(f"    {size / 1e6:10.1f} MB {name}")
        complaints += [row.excess] if options.check and row.excess else []
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
