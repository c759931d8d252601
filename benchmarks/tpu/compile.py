"""Compiles a function for one core of a TPU that this machine does not have, and reports a kernel's schedule.

Import this before anything initialises JAX: libtpu reads its dump folder from the environment when it is loaded.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DUMP = Path(tempfile.mkdtemp(prefix="tpu-schedule-"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
# Only what `tpu.schedule` reads: a kernel after every pass is hundreds of files, which take a third of the time.
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
)
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding  # noqa: E402

from sharding.topologies import topologies as slices  # noqa: E402
from tpu.schedule import Loop, read_kernel  # noqa: E402

jax.config.update("jax_platforms", "cpu")


@dataclass(frozen=True)
class KernelReport:
    """The kernel's loops, the HBM bytes allocated beside arguments and results, and (`glue`) the instructions of the
    entry computation that are neither kernels nor free."""

    loops: list[Loop]
    temporaries: int
    glue: list[str]


def compile_for(
    chip: str,
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]],
    trips: Callable[[], tuple[int, ...]],
    kernel: str,
    donate: tuple[int, ...] = (),
) -> tuple[KernelReport, tuple[int, ...]]:
    """Compiles the function that `build` returns, for the ShapeDtypeStructs that it returns too, and reports on the
    pallas_call named `kernel`; also returns `trips()`. Both are called with the chip's abstract mesh in use."""
    shutil.rmtree(_DUMP, ignore_errors=True)
    _DUMP.mkdir()
    device = topologies.get_topology_desc(platform="tpu", topology_name=slices(chip)[0].name).devices[0]
    place = SingleDeviceSharding(device)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        function, arguments = build()
        placed = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place), arguments)
        # A new function each time: jit caches traces by function, and they differ between chips.
        traced = jax.jit(lambda *arrays: function(*arrays), donate_argnums=donate).trace(*placed)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        loop_trips = trips()
    report = KernelReport(
        loops=read_kernel(_DUMP, kernel),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        glue=_glue(compiled.as_text()),
    )
    shutil.rmtree(_DUMP)
    return report, loop_trips


_FREE = ("parameter(", "bitcast(", "custom-call(", "tuple(", "get-tuple-element(", "constant(")


def _glue(text: str) -> list[str]:
    entry = text[text.index("\nENTRY ") :].splitlines()[2:]
    lines = [line.strip().removeprefix("ROOT ") for line in entry if " = " in line]
    return [line.split(", metadata=")[0][:160] for line in lines if not any(f" {free}" in line for free in _FREE)]
