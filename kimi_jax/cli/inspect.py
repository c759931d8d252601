"""`kimi-jax inspect`: what is in a checkpoint."""

import argparse

from kimi_jax.cli.arguments import place

NAME = "inspect"
SUMMARY = "Show what is in a checkpoint, published or converted, or in a preset: layers, dtypes, parameters, bytes."
EXAMPLE = "kimi-jax inspect ~/models/Kimi-K2.5\n  kimi-jax inspect --preset kimi-k2.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("path", type=place, nargs="?", help="a checkpoint's folder or URL")
    which.add_argument("--preset", metavar="NAME", help="a published model's configuration, no weights needed")


def run(arguments: argparse.Namespace) -> None:
    import checkpoints
    from kimi_jax import config_json
    from kimi_jax.cli.console import console

    if arguments.preset is not None:
        summary = checkpoints.summary_of_config(config_json.preset(arguments.preset))
    else:
        summary = checkpoints.summary(arguments.path)
    console().print(checkpoints.table(summary))
