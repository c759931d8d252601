"""Runs `kimi-jax plan`, which says on which slices of TPUs or GPUs a model fits and what bounds a step."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kimi_jax.cli.arguments import add_draft, local, number, place, whole
from kimi_jax.cli.console import console
from kimi_jax.cli.models import PROMPT_LOOKUP

NAME = "plan"
SUMMARY = (
    "Plan a job on slices of TPUs or GPUs: does the model fit, with how much context and batch, and how many tokens a "
    "second are there at most? Compiles the step where a compiler is installed (libtpu, or kimi-jax[gpu-compile]); "
    "needs neither TPU nor GPU."
)
EXAMPLE = (
    "kimi-jax plan --model k2.5 --topology v5p:4x4x4 --batch 64 --context 32768 --plot plan.png\n"
    "  kimi-jax plan --model k2.5 --topology all --batch 64 --price 2.5\n"
    "  kimi-jax plan --model linear-48b --topology h100:1 --experts int4\n"
    "  kimi-jax plan --model ~/models/Kimi-K2 --topology v6e:8x8 --phase prefill --json"
)


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints the slices that there are."""
        from kimi_jax.plan import listing

        print("\n".join(listing.lines()))
        parser.exit()


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
        help="slice like v5p:4x4x4 or h100:8, or `all` for every known slice; may be repeated",
    )
    parser.add_argument("--list", action=_List, nargs=0, help="list the slices that there are, and exit")
    parser.add_argument(
        "--experts",
        choices=["int4", "bf16"],
        help="format of the routed experts (default: as published, but FP8 becomes bf16)",
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
    add_draft(parser)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the step, minutes for each slice; or plan by arithmetic and traces, in seconds, without a "
        "compiler (default: compile slices that are named, and none of `all`)",
    )
    parser.add_argument(
        "--price",
        type=number(0.0, 1e6, above=True),
        metavar="N",
        help="dollars for a chip and hour: also show the least cost of a million tokens",
    )
    parser.add_argument(
        "--details", action="store_true", help="show every slice's plan in full (default: where there is one slice)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: a list with one object per slice")
    parser.add_argument(
        "--plot", type=local, metavar="FILE", help="draw the plans as FILE.png or FILE.svg (needs kimi-jax[plot])"
    )


def run(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and leaves one to others
    from kimi_jax.plan import refusal, table
    from kimi_jax.plan.planner import with_experts
    from sharding import mesh_sizes
    from sharding.topologies import topologies, topology

    draw = None if arguments.plot is None else _drawing(arguments)
    model, config = _named_config(arguments.model)
    if arguments.experts is not None:
        config = with_experts(config, arguments.experts)
    slices = topologies() if arguments.topology == ["all"] else [topology(name) for name in arguments.topology]
    sizes = None if arguments.mesh is None else mesh_sizes(arguments.mesh)
    log = console(stderr=True)
    compiles = _compiled_slices(arguments, slices, log)
    make = (_training if arguments.train else _inference)(arguments, model, config, sizes)

    plans, records = [], []
    with log.status("") as status:  # a terminal has a line for it, a pipe nothing
        for done, slice_ in enumerate(slices):
            status.update(f"planning {slice_.name} ({done} of {len(slices)} done)")
            try:
                plans.append(make(slice_, _compiler(arguments, log) if slice_ in compiles else None))
            except ValueError as error:
                if len(slices) == 1:
                    raise
                records.append(refusal.as_json(slice_, error))
                continue
            record = plans[-1].as_json()
            if arguments.price is not None:
                record["cost"] = table.cost(record, arguments.price)
            records.append(record)
    if not plans:
        raise ValueError("; ".join(record["error"] for record in records))
    if draw is not None:
        draw(records, arguments.plot)
    if arguments.json:
        print(json.dumps(records, indent=2))
    else:
        _show(arguments, plans, records)


def _drawing(arguments: argparse.Namespace) -> Callable[[Any, Path], None]:
    """Returns the function that draws. Raises ValueError where it is not there, or draws no such plans or files."""
    if arguments.train:
        raise ValueError("--train goes without --plot, --phase, --chunk and --draft")
    try:
        from kimi_jax.plan import plot
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'kimi-jax[plot]'") from error
    if (suffix := arguments.plot.suffix[1:].lower()) not in plot.FORMATS:
        raise ValueError(f"--plot {arguments.plot.name!r} ends in {suffix!r}, expected .{' or .'.join(plot.FORMATS)}")
    return plot.save


def _compiled_slices(arguments: argparse.Namespace, slices: Sequence[Any], log: Console) -> list[Any]:
    """Returns the slices whose steps are compiled; says of others once why they are not."""
    from kimi_jax import plan as planning

    wanted = arguments.topology != ["all"] if arguments.compile is None else arguments.compile
    if not wanted:
        return []
    reasons = {slice_: planning.missing(slice_, training=arguments.train) for slice_ in slices}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        log.print(f"{reason}: arithmetic", markup=False, highlight=False, soft_wrap=True)
    return [slice_ for slice_, reason in reasons.items() if reason is None]


def _compiler(arguments: argparse.Namespace, log: Console) -> Callable[[Any], Any]:
    """Returns the function that compiles a job and says so."""
    from kimi_jax import plan as planning

    def compile_step(job: Any) -> Any:
        if arguments.train:
            step = f"a training step of {job.config.text.num_hidden_layers} layers"
        else:
            step = f"{job.phase} of {job.batch} x {job.context:,} tokens"
        log.print(f"compiling {step} for {job.topology.name} ...", soft_wrap=True)
        return planning.compiled(job)

    return compile_step


def _inference(arguments: argparse.Namespace, model: str, config: Any, sizes: Any) -> Callable[[Any, Any], Any]:
    """Returns the function that plans a step of inference on a slice, with a compiler or None."""
    from kimi_jax import plan as planning
    from kimi_jax.runtime.generate import PREFILL_CHUNK

    chunk = 1 if arguments.phase == "decode" else arguments.chunk or min(PREFILL_CHUNK, arguments.context)
    draft = _draft(arguments, config)
    chunk += 0 if draft is None else draft.tokens

    def make(slice_: Any, compile_step: Any) -> planning.Plan:
        job = planning.Job(config, slice_, (), arguments.phase, arguments.batch or 1, arguments.context, chunk, draft)
        return planning.plan(model, job, sizes=sizes, compile_step=compile_step)

    return make


def _draft(arguments: argparse.Namespace, config: Any) -> Any:
    """Returns the `Drafting` that the flags ask for. Raises ValueError for a step that drafts nothing, and for what is
    no head of the model."""
    if arguments.draft is None:
        return None
    if arguments.phase != "decode":
        raise ValueError("--draft goes with decode steps, without --phase prefill")
    from kimi_jax.plan.job import Drafting

    if arguments.draft == PROMPT_LOOKUP:
        return Drafting(arguments.draft_tokens)
    from checkpoints.files.place import locate
    from kimi_jax import config_json
    from kimi_jax.config import EagleConfig

    folder = locate(arguments.draft)
    head = config_json.read_config(folder)
    if not isinstance(head, EagleConfig):
        raise ValueError(f"--draft {folder}: is a model, not a draft head")
    return Drafting(arguments.draft_tokens, config_json.fit_target(head, config, str(folder / "config.json")))


def _training(arguments: argparse.Namespace, model: str, config: Any, sizes: Any) -> Callable[[Any, Any], Any]:
    """Returns the function that plans a step of training on a slice, with a compiler or None."""
    from kimi_jax.plan.train_job import TrainJob
    from kimi_jax.plan.train_plan import TrainPlan, train_plan

    if arguments.phase != "decode" or arguments.chunk is not None or arguments.draft is not None:
        raise ValueError("--train goes without --plot, --phase, --chunk and --draft")

    def make(slice_: Any, compile_step: Any) -> TrainPlan:
        job = TrainJob(config, slice_, sizes or (), arguments.batch or slice_.devices, arguments.tokens)
        return train_plan(model, job, compile_step=compile_step)

    return make


def _show(arguments: argparse.Namespace, plans: list[Any], records: list[dict[str, Any]]) -> None:
    """Prints the table, and details where they are asked for or there is one slice."""
    from kimi_jax.plan import report, table, train_report

    out = console()
    shown = train_report if arguments.train else report
    out.print(f"[bold]{shown.title(plans[0])}[/]", highlight=False)
    for line in table.lines(records):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print("tokens/s at most: those of a step over its least time", highlight=False)
    if arguments.price is not None:
        out.print(f"$/M: a million tokens cost at least so many dollars, at {arguments.price:g} a chip and hour")
    if arguments.details or len(records) == 1:
        for plan in plans:
            out.print()
            shown.show(out, plan)
    else:
        out.print("`--details`, or one --topology, shows memory, times and messages of each", highlight=False)
    if arguments.train:
        out.print()
        train_report.show_slices(out, plans[0])


def _named_config(model: Path | str) -> tuple[str, Any]:
    """Returns name and configuration of a preset, whose `kimi-` may be left out, or of the folder or URL `model`."""
    from checkpoints.files.place import locate
    from kimi_jax import config_json

    folder = locate(model)
    if isinstance(model, str) or (folder / "config.json").is_file():
        return folder.name, config_json.from_folder(folder)
    full = config_json.preset_name(str(model))
    return full, config_json.preset(full)
