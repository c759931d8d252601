"""Runs `kimi-jax demo`, which takes a small trained checkpoint from its published files to an answer."""

import argparse

from kimi_jax.cli.arguments import local
from kimi_jax.printable import printable

NAME = "demo"
SUMMARY = (
    "Take a small trained model from its published files to an answer, on this machine: convert it, load it over 8 "
    "simulated devices, let it read a handwritten number and add two with a tool."
)
EXAMPLE = "kimi-jax demo\n  kimi-jax demo --image digits.png\n  kimi-jax demo --keep ~/kimi-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=local, metavar="FILE", help="picture to read (default: numbers of its own)")
    parser.add_argument(
        "--keep",
        type=local,
        metavar="DIR",
        help="keep the converted model and the pictures here, and show what to try with them (default: all is removed)",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.image is not None and not arguments.image.is_file():
        raise FileNotFoundError(f"{printable(arguments.image)}: no such file")
    if arguments.keep is not None and arguments.keep.exists() and not arguments.keep.is_dir():
        raise NotADirectoryError(f"{printable(arguments.keep)}: is a file, and the demo is kept in a folder")
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # Nearly all of the demo's time is compiling, and a tiny model runs as fast without XLA's costly passes
    jax.config.update("jax_disable_most_optimizations", True)
    from kimi_jax import demo
    from kimi_jax.cli.console import console

    demo.run(console(), picture=arguments.image, keep=arguments.keep)
