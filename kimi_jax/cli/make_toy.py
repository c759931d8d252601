"""Runs `kimi-jax make-toy`, which writes a small checkpoint in the published layout."""

import argparse
import json

from kimi_jax import config_json, json_reader
from kimi_jax.cli.arguments import (
    FORMS,
    SEED_MAX,
    add_json,
    add_shard_size,
    field,
    local,
    place,
    preset,
    progress,
    whole,
)
from kimi_jax.cli.terminal import print_line

NAME = "make-toy"
SUMMARY = (
    "Write a small checkpoint in the published layout: a model of real widths with fewer layers and experts, and with "
    "random weights or those of a published folder."
)
EXAMPLE = (
    "kimi-jax make-toy /tmp/k2.5 --like k2.5 --layers 2 --experts 16\n"
    "  kimi-jax make-toy /tmp/k2 --like k2 --form fp8 --layers 2 --experts 8 --set vocab_size=2048\n"
    "  kimi-jax make-toy /tmp/cut --from ~/models/Kimi-K2.5 --layers 1"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", type=local, help="folder to write; must be new or empty")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--like",
        type=preset,
        metavar="NAME",
        help="model to resemble, with random weights: k2, k2-thinking, k2.5, k3 or kimi-linear",
    )
    weights.add_argument(
        "--from", dest="source", type=place, metavar="FOLDER", help="published folder or URL to copy weights from"
    )
    parser.add_argument("--layers", type=whole(1), metavar="N", help="keep the first N layers (default: all)")
    parser.add_argument(
        "--experts", type=whole(1), metavar="N", help="keep each layer's first N experts (default: all)"
    )
    parser.add_argument(
        "--vision-layers", type=whole(1), metavar="N", help="keep the vision tower's first N layers (default: all)"
    )
    parser.add_argument("--form", choices=FORMS, help="with --like: format of the weights (default: as released)")
    parser.add_argument(
        "--set",
        dest="fields",
        type=field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="with --like: change a field of config.json, like hidden_size=256; may be repeated",
    )
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, metavar="N", help="seed of the random weights (default 0)"
    )
    add_shard_size(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from checkpoints.files.place import locate
    from checkpoints.published.quantization_config import describe_form
    from checkpoints.toy import cut_config, make_toy, toy_config

    if arguments.source is not None and (arguments.form or arguments.fields):
        raise ValueError("--form and --set go with --like; with --from, the weights are as they are")
    if arguments.source is not None:
        file = locate(arguments.source) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        config = json_reader.read_object(file)
    else:
        config = toy_config(arguments.like, **dict(arguments.fields))
        if arguments.form:
            config = describe_form(config, arguments.form)
    config = cut_config(
        config, layers=arguments.layers, experts=arguments.experts, vision_layers=arguments.vision_layers
    )
    if arguments.source is None:
        config_json.from_dict(config, where="the config.json asked for")  # refused here, not by who reads the folder
    with progress(arguments, "writing") as show:
        folder = make_toy(
            arguments.dst,
            config,
            seed=arguments.seed,
            source=arguments.source,
            shard_bytes=arguments.shard_size,
            progress=show,
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    if arguments.json:
        print(json.dumps({"event": "written", "destination": str(folder), "nbytes": size}))
    else:
        print_line(f"{folder}: {size:,} bytes")
