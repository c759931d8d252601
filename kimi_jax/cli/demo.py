"""`kimi-jax demo`: the whole way of a checkpoint with a toy."""

import argparse

from kimi_jax.cli.arguments import local

NAME = "demo"
SUMMARY = "The whole way on this machine, with a toy and random weights: convert, load over 8 devices, look, answer."
EXAMPLE = "kimi-jax demo --image cat.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=local, help="a picture of yours (default: one that the demo draws)")


def run(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from kimi_jax import demo
    from kimi_jax.cli.console import console

    demo.run(console(), picture=arguments.image)
