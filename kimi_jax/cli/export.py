"""`kimi-jax export`: an Orbax checkpoint becomes a published folder again."""

import argparse
import dataclasses
import json

from kimi_jax.cli.arguments import add_limits, add_shard_size, local, place, progress
from kimi_jax.cli.terminal import print_line

NAME = "export"
SUMMARY = "Turn an Orbax checkpoint that convert wrote back into a published folder: safetensors, index, and the rest."
EXAMPLE = "kimi-jax export ~/models/kimi-k2.5-orbax ~/models/Kimi-K2.5-again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=place, help="folder or URL that convert wrote")
    parser.add_argument("dst", type=local, help="folder to write; must not exist, or be empty")
    add_shard_size(parser)
    add_limits(parser)


def run(arguments: argparse.Namespace) -> None:
    import checkpoints

    with progress(arguments, "exporting") as show:
        report = checkpoints.export(
            arguments.src,
            arguments.dst,
            shard_bytes=arguments.shard_size,
            memory=arguments.memory,
            workers=arguments.workers,
            progress=show,
        )
    if arguments.json:
        print(json.dumps({"event": "exported", **dataclasses.asdict(report)}, default=str))
        return
    print_line(
        f"{report.destination}: {report.tensors:,} tensors, {report.nbytes:,} bytes in {report.shards} shards; "
        f"carried along: {', '.join(report.carried)}"
    )
