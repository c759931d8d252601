"""Runs `kimi-jax demo`, which takes a small trained checkpoint from its published files to an answer."""

import argparse

from kimi_jax.cli.arguments import local

NAME = "demo"
SUMMARY = (
    "Take a small trained model from its published files to an answer, on this machine: convert it, load it over 8 "
    "simulated devices, let it read a handwritten number and add two with a tool."
)
EXAMPLE = "kimi-jax demo --image digits.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=local, metavar="FILE", help="picture to read (default: numbers of its own)")


def run(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from kimi_jax import demo
    from kimi_jax.cli.console import console

    demo.run(console(), picture=arguments.image)
