"""Runs `kimi-jax export`, which turns an Orbax checkpoint back into a published folder."""

import argparse
import dataclasses
import json

from kimi_jax.cli.arguments import add_limits, add_shard_size, local, place, progress
from kimi_jax.cli.models import check_folder
from kimi_jax.cli.terminal import print_line

NAME = "export"
SUMMARY = (
    "Turn a converted checkpoint back into a published folder: safetensors with their index, config.json, and the "
    "files that conversion carried along, like the tokenizer's."
)
EXAMPLE = (
    "kimi-jax export ~/models/kimi-k2.5-orbax ~/models/Kimi-K2.5-again\n"
    "  kimi-jax export ~/models/toy-orbax ~/models/toy --shard-size 500MB\n"
    "  kimi-jax export gs://bucket/kimi-k2-orbax ~/models/Kimi-K2 --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", type=place, help="converted checkpoint's folder or URL")
    parser.add_argument("dst", type=local, help="folder to write; must be new or empty")
    add_shard_size(parser)
    add_limits(parser)


def run(arguments: argparse.Namespace) -> None:
    check_folder(arguments.src)
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
