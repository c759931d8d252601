"""Runs `kimi-jax convert`, which turns a published folder into an Orbax checkpoint."""

import argparse
import dataclasses
import json

from kimi_jax.cli.arguments import FORMS, add_limits, local, place, progress, whole
from kimi_jax.cli.models import check_folder
from kimi_jax.cli.terminal import print_line

NAME = "convert"
SUMMARY = (
    "Turn a published safetensors folder into an Orbax checkpoint. INT4 weights stay INT4, and every expert is a chunk "
    "of its own. Run the same command again to continue a conversion that was stopped."
)
EXAMPLE = (
    "kimi-jax convert ~/models/Kimi-K2.5 ~/models/kimi-k2.5-orbax --memory 4GiB\n"
    "  kimi-jax convert gs://bucket/Kimi-K2 ~/models/kimi-k2 --experts int4\n"
    "  kimi-jax convert ~/models/Kimi-K2.5 /shared/k2.5 --process-index 0 --num-processes 4"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src", type=place, help="folder or URL (gs://, s3://, hf://) with config.json and *.safetensors"
    )
    parser.add_argument("dst", type=local, help="folder to write")
    parser.add_argument(
        "--experts", choices=FORMS, help="format of the routed experts (default: as published, but FP8 becomes bf16)"
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="dtype of all other weights (default: as published, but FP8 becomes bfloat16)",
    )
    add_limits(parser)
    parser.add_argument(
        "--process-index",
        type=whole(0),
        default=0,
        metavar="I",
        help="number of this process among those that write dst together, from 0 (default 0)",
    )
    parser.add_argument(
        "--num-processes", type=whole(1), default=1, metavar="N", help="number of those processes (default 1)"
    )


def run(arguments: argparse.Namespace) -> None:
    check_folder(arguments.src)
    import jax

    jax.config.update("jax_platforms", "cpu")  # conversion uses JAX only for the shapes of a model
    import checkpoints

    with progress(arguments, "converting") as show:
        report = checkpoints.convert(
            arguments.src,
            arguments.dst,
            experts=arguments.experts,
            dtype=arguments.dtype,
            memory=arguments.memory,
            workers=arguments.workers,
            process_index=arguments.process_index,
            num_processes=arguments.num_processes,
            progress=show,
        )
    if arguments.json:
        print(json.dumps({"event": "converted", **dataclasses.asdict(report)}, default=str))
        return
    state = "was there already" if not report.made_bytes else f"{report.made_bytes:,} bytes written"
    if not report.whole:
        state += f"; the share of process {arguments.process_index} is done, others are still missing"
    elif report.made_bytes and report.found_bytes:
        state += f", {report.found_bytes:,} found from before"
    print_line(f"{report.destination}: {report.tensors:,} tensors in {report.leaves:,} leaves; {state}")
    if report.skipped:
        print_line(f"skipped {len(report.skipped)} tensors that the model does not use, like {report.skipped[0]}")
