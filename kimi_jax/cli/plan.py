"""Runs `kimi-jax plan`, which says whether a model fits on a TPU slice and what bounds a step."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_jax.cli.arguments import local, place, whole

NAME = "plan"
SUMMARY = (
    "Plan a job on a TPU slice: does the model fit, with how much context and batch, and how many bytes does a step "
    "move? Compiles the step for the slice where libtpu is installed; needs no TPU."
)
EXAMPLE = (
    "kimi-jax plan --model k2.5 --topology v5p:4x4x4 --batch 64 --context 32768 --plot plan.png\n"
    "  kimi-jax plan --model k2.5 --topology all --no-compile\n"
    "  kimi-jax plan --model ~/models/Kimi-K2 --topology v6e:8x8 --phase prefill --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=place,
        required=True,
        metavar="NAME",
        help="preset like k2.5, or folder or URL with a config.json",
    )
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="SLICE",
        help="slice like v5p:4x4x4, or `all` for every known slice; may be repeated",
    )
    parser.add_argument(
        "--mesh",
        metavar="MESH",
        help="devices of each axis, like 4x8x2 or data=4,tensor=2 (default: the fastest by the plan's bounds)",
    )
    parser.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help="sequences (default: 1, or in training one for each device)",
    )
    parser.add_argument(
        "--context", type=whole(1), default=8192, metavar="N", help="tokens of each sequence (default %(default)s)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="plan a step of quantisation-aware training by MuonClip instead: layers compiled, the model extrapolated",
    )
    parser.add_argument(
        "--tokens", type=whole(1), default=4096, metavar="N", help="with --train: tokens of a row (default %(default)s)"
    )
    parser.add_argument(
        "--phase", choices=["decode", "prefill"], default="decode", help="kind of step (default %(default)s)"
    )
    parser.add_argument(
        "--chunk",
        type=whole(1),
        metavar="N",
        help="tokens of each sequence in a prefill step (default: 2,048, or the context if shorter)",
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="compile nothing: plan by arithmetic and traces, in seconds, without libtpu",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a list with one object per slice")
    parser.add_argument("--plot", type=local, metavar="FILE.png", help="draw memory and lower bounds of time")


def run(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and leaves one to others
    from kimi_jax import plan as planning
    from kimi_jax.cli.console import console
    from kimi_jax.plan import plot, report
    from kimi_jax.runtime.generate import PREFILL_CHUNK
    from sharding import mesh_sizes
    from sharding.topologies import topologies, topology

    model, config = _named_config(arguments.model)
    slices = topologies() if arguments.topology == ["all"] else [topology(name) for name in arguments.topology]
    sizes = None if arguments.mesh is None else mesh_sizes(arguments.mesh)
    log = console(stderr=True)
    if arguments.train:
        _run_training(arguments, model, config, slices, () if sizes is None else sizes)
        return
    chunk = 1 if arguments.phase == "decode" else arguments.chunk or min(PREFILL_CHUNK, arguments.context)
    compiles = arguments.compile and planning.available()
    if arguments.compile and not compiles:
        log.print("libtpu, the TPU compiler, is not installed (Linux x86-64: pip install libtpu): arithmetic alone")

    def compile_step(job: planning.Job) -> planning.Compiled:
        log.print(f"compiling {job.phase} of {job.batch} x {job.context:,} tokens for {job.topology.name} ...")
        return planning.compiled(job)

    plans, refused = [], {}
    for slice_ in slices:
        job = planning.Job(config, slice_, (), arguments.phase, arguments.batch or 1, arguments.context, chunk)
        try:
            plans.append(planning.plan(model, job, sizes=sizes, compile_step=compile_step if compiles else None))
        except ValueError as error:
            if len(slices) == 1:
                raise
            refused[slice_.name] = str(error)
    if not plans:
        raise ValueError("; ".join(refused.values()))
    if arguments.plot is not None:
        plot.save(plans, arguments.plot)
    if arguments.json:
        errors = [{"topology": name, "error": reason} for name, reason in refused.items()]
        print(json.dumps([plan.as_json() for plan in plans] + errors, indent=2))
    else:
        report.show_all(console(), plans, refused)


def _run_training(
    arguments: argparse.Namespace, model: str, config: Any, slices: Sequence[Any], sizes: tuple[int, ...]
) -> None:
    from kimi_jax import plan as planning
    from kimi_jax.cli.console import console
    from kimi_jax.plan import train_report
    from kimi_jax.plan.train_job import TrainJob
    from kimi_jax.plan.train_plan import train_plan

    if arguments.plot is not None or arguments.phase != "decode" or arguments.chunk is not None:
        raise ValueError("--train goes without --plot, --phase and --chunk")
    log = console(stderr=True)
    compiles = arguments.compile and planning.available()
    if arguments.compile and not compiles:
        log.print("libtpu, the TPU compiler, is not installed (Linux x86-64: pip install libtpu): traces alone")

    def compile_step(job: TrainJob) -> planning.Compiled:
        layers = job.config.text.num_hidden_layers
        log.print(f"compiling a training step of {layers} layers for {job.topology.name} ...")
        return planning.compiled(job)

    plans, refused = [], {}
    for slice_ in slices:
        job = TrainJob(config, slice_, sizes, arguments.batch or slice_.devices, arguments.tokens)
        try:
            plans.append(train_plan(model, job, compile_step=compile_step if compiles else None))
        except ValueError as error:
            if len(slices) == 1:
                raise
            refused[slice_.name] = str(error)
    if not plans:
        raise ValueError("; ".join(refused.values()))
    if arguments.json:
        errors = [{"topology": name, "error": reason} for name, reason in refused.items()]
        print(json.dumps([plan.as_json() for plan in plans] + errors, indent=2))
    else:
        train_report.show_all(console(), plans, refused)


def _named_config(model: Path | str) -> tuple[str, Any]:
    """Returns name and configuration of a preset, whose `kimi-` may be left out, or of the folder or URL `model`."""
    from checkpoints.files.place import locate
    from kimi_jax import config_json

    folder = locate(model)
    if isinstance(model, str) or (folder / "config.json").is_file():
        return folder.name, config_json.from_folder(folder)
    full = config_json.preset_name(str(model))
    return full, config_json.preset(full)
