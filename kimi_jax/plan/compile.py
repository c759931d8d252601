"""Compiles a job's step for TPUs and GPUs that are not here (libtpu, no TPU; XLA for CUDA, no GPU), full size, with
abstract weights.

In a process of its own (`python -m kimi_jax.plan.compile` is that process): both compilers read the environment once,
libtpu ends its process where it is displeased, and a full-size compilation takes gigabytes that should go back.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from typing import Any

from kimi_jax.plan import gpu_target, gpu_traffic
from kimi_jax.plan.hbm import hbm_bytes
from kimi_jax.plan.hlo import HloProgram, parse, small_cycles
from kimi_jax.plan.job import Job
from kimi_jax.plan.refusal import GB
from kimi_jax.plan.traffic import Collective, MovedWeight, collectives, moved_weights
from kimi_jax.plan.train_job import TrainJob
from pallas_kernels.hardware import Gpu
from sharding.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a device's program. `arguments` are weights, cache and tokens, of which `in_place` are
    results too; `results` come beside them. `hbm_bytes` goes to and from HBM (`plan.hbm`, `plan.gpu_traffic`);
    `accessed` is the compiler's own count, of all memories together. `small_cycles` is its estimate for what is neither
    kernel nor message (`plan.hlo`). Of `program`, `accessed` and `small_cycles` XLA for GPUs says nothing: 0.
    `cpu_seconds` beside `seconds` shows how busy the machine was."""

    arguments: int
    results: int
    in_place: int
    temporaries: int
    program: int
    hbm_bytes: int
    accessed: float
    small_cycles: int
    collectives: tuple[Collective, ...]
    moved: tuple[MovedWeight, ...]
    seconds: float
    cpu_seconds: float

    @property
    def beside_arguments(self) -> int:
        """Bytes that a device needs for the step beyond weights and cache."""
        return self.temporaries + self.program + max(0, self.results - self.in_place)


class DoesNotFitError(ValueError):
    """The compiler found too little memory on a device."""


def available() -> bool:
    """Tells whether libtpu, the compiler, is installed (Linux on x86-64 only)."""
    return importlib.util.find_spec("libtpu") is not None


def missing(topology: Topology, *, training: bool = False) -> str | None:
    """Says in a line why no step is compiled for the slice on this machine, None where it can be."""
    if not topology.is_gpu:
        return None if available() else "libtpu is not installed (Linux x86-64: pip install libtpu)"
    if training:
        return "training steps are not compiled for GPUs"
    assert isinstance(topology.chip, Gpu)
    try:
        gpu_target.environment()
        gpu_target.target_config(topology.chip)
    except ValueError as error:
        return str(error)
    return None


def compiled(job: Job | TrainJob) -> Compiled:
    """Compiles in a process of its own, which takes minutes for a full model.

    Raises DoesNotFitError where the compiler says so, or its numbers of a GPU do; ValueError with its last words where
    it fails otherwise, and where it is not installed.
    """
    keep = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    if job.topology.is_gpu:
        own = gpu_target.environment()
    else:
        # quiet, beside other users of libtpu, and without asking a cloud that is not there
        own = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "TPU_STDERR_LOG_LEVEL": "3"}
        own |= {"JAX_PLATFORMS": "cpu", "TPU_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "kimi_jax.plan.compile"],
        input=pickle.dumps(job),
        capture_output=True,
        env=keep | own | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        short = next((line for line in words if "Ran out of memory" in line), None)
        if short is not None:
            raise DoesNotFitError(re.sub(r"^.*?(?=Ran out of memory)", "", short))
        raised = [line for line in words if re.match(r"[\w.]+(Error|Exception)\b", line)] or words[-1:]
        raise ValueError(f"the compiler failed ({done.returncode}): {raised[-1] if raised else 'without a word'}")
    found = json.loads(done.stdout.decode().splitlines()[-1])
    found["collectives"] = tuple(Collective(**{**one, "axes": tuple(one["axes"])}) for one in found["collectives"])
    found["moved"] = tuple(MovedWeight(**one) for one in found["moved"])
    made, memory = Compiled(**found), job.topology.chip.memory
    if job.topology.is_gpu and (needs := made.arguments + made.beside_arguments) > memory:
        raise DoesNotFitError(f"Ran out of memory: {needs / GB:.2f} GB of {memory / GB:.2f}")
    return made


def _compile(job: Job | TrainJob) -> Compiled:
    """Compiles in this process."""
    from sharding import make_mesh

    found = devices(job.topology)
    # GPUs may stay idle
    mesh = make_mesh(job.sizes, found[: math.prod(job.sizes)] if job.topology.is_gpu else found)
    began, cpu = time.perf_counter(), _cpu_seconds()
    if isinstance(job, TrainJob):
        from kimi_jax.plan.train_step import EXPERTS, trace

        traced, weights = trace(job, mesh), EXPERTS
    else:
        traced, weights = _trace_text_step(job, mesh), r"(arrays|head)\["
    made = traced.lower(lowering_platforms=(job.topology.platform,)).compile()
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu
    memory, hlo = made.memory_analysis(), parse(made.as_text())
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        hbm_bytes=traffic(hlo, job.topology),
        accessed=(made.cost_analysis() or {}).get("bytes accessed", 0.0),
        small_cycles=small_cycles(hlo),
        collectives=tuple(collectives(hlo, job.mesh)),
        moved=tuple(moved_weights(hlo, weights)),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def devices(topology: Topology) -> list[Any]:
    """Returns JAX's devices of a slice that is not here. This process's environment has to be the compiler's."""
    from jax.experimental import topologies

    if topology.is_gpu:
        return gpu_target.devices(topology)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)


def traffic(hlo: HloProgram, topology: Topology) -> int:
    """Counts the bytes that a device's program moves to and from its memory."""
    return gpu_traffic.memory_bytes(hlo) if topology.is_gpu else hbm_bytes(hlo)


def _cpu_seconds() -> float:
    """Returns this process's CPU time, and that of its ended children: the assembler for GPUs is one."""
    return sum(os.times()[:4])


def _trace_text_step(job: Job, mesh: Any) -> Any:
    from kimi_jax.model.kimi import abstract
    from kimi_jax.plan.messages import program_of, trace

    # A text step has no use for the vision tower, and XLA would drop it from the arguments.
    config = dataclasses.replace(job.config, vision=None)
    return trace(program_of(job, abstract(config, mesh=mesh), mesh), job)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_compile(pickle.load(sys.stdin.buffer)))))
