"""Runs `kimi-jax inspect`, which shows the contents of a checkpoint."""

import argparse

from kimi_jax.cli.arguments import place
from kimi_jax.cli.models import check_folder

NAME = "inspect"
SUMMARY = "Show the layers, dtypes, parameters and bytes of a checkpoint, published or converted, or of a preset."
EXAMPLE = (
    "kimi-jax inspect ~/models/Kimi-K2.5\n"
    "  kimi-jax inspect --preset kimi-k2.5\n"
    "  kimi-jax inspect gs://bucket/kimi-k2.5-orbax"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("path", type=place, nargs="?", help="checkpoint's folder or URL")
    source.add_argument(
        "--preset", metavar="NAME", help="published model, like kimi-k2.5, from its configuration; needs no weights"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.preset is None:
        check_folder(arguments.path)
    import checkpoints
    from kimi_jax.cli.console import console

    preset = arguments.preset
    summary = checkpoints.summary(arguments.path) if preset is None else checkpoints.summary_of_preset(preset)
    console().print(checkpoints.table(summary))
