"""Runs `kimi-jax train`, which fine-tunes a checkpoint on conversations and publishes the result."""

import argparse
import logging
import re
import time
from typing import Any

from kimi_jax.cli.arguments import SEED_MAX, add_mesh, add_processes, joined, local, mesh_of, number, whole
from kimi_jax.cli.models import check_folder
from kimi_jax.cli.starting import add_compile_cache, keep_programs

NAME = "train"
SUMMARY = (
    "Fine-tune a checkpoint on conversations, by MuonClip, with experts trained for INT4 (quantisation-aware), and "
    "publish it in the layout of the releases. With --resume, the same command goes on where it was stopped."
)
EXAMPLE = (
    "kimi-jax train ~/models/toy --data chats.jsonl --out runs/first --steps 200 --tokens 512\n"
    "  kimi-jax train ~/models/toy --data chats.jsonl --out runs/first --steps 400 --resume\n"
    "  kimi-jax train ~/models/kimi-k2.5-orbax --data chats.jsonl --out runs/mesh --mesh 1x8x1"
)

ADAPTER_RANK = 16
LINE_EVERY_S = 30.0  # where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=local, help="a checkpoint's folder, converted or published")
    parser.add_argument(
        "--data",
        type=local,
        required=True,
        metavar="FILE",
        help="JSON lines, each with messages in OpenAI's schema, and tools and thinking if wanted; pictures by path "
        "from the file's folder, or as data URLs",
    )
    parser.add_argument(
        "--out",
        type=local,
        required=True,
        metavar="DIR",
        help="folder for checkpoints, metrics.jsonl and the published result",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=1000, metavar="N", help="updates of the weights (default 1000)"
    )
    parser.add_argument("--batch", type=whole(1), default=8, metavar="N", help="rows of a step (default 8)")
    parser.add_argument(
        "--microbatches",
        type=whole(1),
        default=1,
        metavar="N",
        help="parts of a step's rows that are computed one after another, in the memory of one (default 1)",
    )
    parser.add_argument(
        "--no-recompute",
        dest="recompute",
        action="store_false",
        help="keep all that gradients need instead of computing each layer again: faster, in more memory",
    )
    parser.add_argument(
        "--tokens",
        type=whole(16),
        default=1024,
        metavar="N",
        help="tokens of a row, which packs conversations (default 1024)",
    )
    parser.add_argument(
        "--lr",
        type=number(0.0, 10.0, above=True),
        default=2e-4,
        metavar="RATE",
        help="peak learning rate (default 2e-4)",
    )
    parser.add_argument(
        "--qat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train experts for INT4 and publish them so (default: as the checkpoint's experts are)",
    )
    parser.add_argument(
        "--train",
        default="all",
        metavar="all|adapters|REGEX",
        help="parameters to train, by a regular expression that matches whole names; INT4 experts that it does not "
        "match stay INT4 and take no optimizer's memory. adapters: low-rank ones (LoRA) of attention, and of dense and "
        "shared MLPs, which are merged when they are published (default all)",
    )
    parser.add_argument(
        "--rank", type=whole(1), default=None, metavar="N", help=f"rank of adapters (default {ADAPTER_RANK})"
    )
    add_mesh(parser)
    add_processes(parser)
    parser.add_argument("--seed", type=whole(0, SEED_MAX), default=0, metavar="N", help="order of the data (default 0)")
    parser.add_argument(
        "--save-every", type=whole(1), default=100, metavar="N", help="steps between checkpoints (default 100)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write metrics for TensorBoard into --out (needs tensorboardX)"
    )
    add_compile_cache(parser)


def run(arguments: argparse.Namespace) -> None:
    check_folder(arguments.path)
    adapters = arguments.train == "adapters"
    if arguments.rank is not None and not adapters:
        raise ValueError(f"--rank {arguments.rank} is the rank of adapters, and goes with --train adapters")
    try:
        pattern = re.compile(".*" if arguments.train == "all" else arguments.train)
    except re.error as error:
        raise ValueError(f"--train {arguments.train!r} is no regular expression: {error}") from None
    with joined(arguments) as links:
        _train(arguments, pattern, aloud=links is None or links.first)


def _train(arguments: argparse.Namespace, pattern: re.Pattern[str], aloud: bool) -> None:
    """Trains; of several processes, one is `aloud`."""
    if not arguments.data.is_file():
        raise FileNotFoundError(f"{arguments.data}: no such file")
    adapters = arguments.train == "adapters"
    from kimi_jax import config_json
    from kimi_jax.cli.console import console
    from kimi_jax.training.adapters import is_adapted
    from kimi_jax.training.run import Run, Settings

    # Orbax logs tracebacks of a write that fails, in every thread that waits for it; the error itself is one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    log = console(stderr=True, quiet=not aloud)
    keep_programs(arguments)
    config = config_json.from_folder(arguments.path)
    quantized = config.text.quantization is not None
    settings = Settings(
        steps=arguments.steps,
        rows=arguments.batch,
        microbatches=arguments.microbatches,
        recompute=arguments.recompute,
        tokens=arguments.tokens,
        learning_rate=arguments.lr,
        quantized=quantized if arguments.qat is None else arguments.qat,
        trainable=is_adapted if adapters else lambda name: pattern.fullmatch(name) is not None,
        adapter_rank=(arguments.rank or ADAPTER_RANK) if adapters else 0,
        seed=arguments.seed,
        save_every=arguments.save_every,
    )
    writer = _summary_writer(arguments) if aloud else None
    run = Run(
        arguments.path,
        arguments.data,
        arguments.out,
        settings,
        mesh=mesh_of(arguments.mesh, config),
        resume=arguments.resume,
    )
    room = run.packing.room
    log.print(
        f"{len(run.documents):,} documents in rows of {room.tokens:,} tokens, {settings.rows} rows a step; "
        f"{'step ' + str(run.step) + ' of ' if run.step else ''}{settings.steps:,} steps"
    )
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    times = (TextColumn("{task.fields[shown]}"), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, *times, console=log, disable=not (aloud and log.is_terminal)) as bar:
            task = bar.add_task("", total=settings.steps, completed=run.step, shown="compiling")
            began, tokens, told = time.monotonic(), 0, 0.0
            for step, metrics in run.steps():
                tokens += int(metrics.tokens)
                rate = tokens / (time.monotonic() - began)
                shown = f"loss {float(metrics.loss):.4f}  {float(metrics.accuracy):.1%}  {rate:,.0f} tokens/s"
                bar.update(task, completed=step + 1, shown=shown)
                now = time.monotonic()
                if not log.is_terminal and (now - told >= LINE_EVERY_S or step + 1 == settings.steps):
                    told = now
                    log.print(f"step {step + 1} of {settings.steps}: {shown}")
                if writer is not None:
                    for name, value in metrics._asdict().items():
                        writer.add_scalar(name, value.item(), step)
        published = run.publish()
        if aloud:
            print(published)
    finally:
        run.close()
        if writer is not None:
            writer.close()


def _summary_writer(arguments: argparse.Namespace) -> Any:
    if not arguments.tensorboard:
        return None
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'kimi-jax[train]'") from None
    return SummaryWriter(str(arguments.out / "tensorboard"))
