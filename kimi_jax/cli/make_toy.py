"""Runs `kimi-jax make-toy`, which writes a small checkpoint in the published layout."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax import config_json, json_reader
from kimi_jax.cli.arguments import (
    FORMS,
    HEADS,
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

if TYPE_CHECKING:
    from checkpoints.files.place import Place

NAME = "make-toy"
ASKED = "the config.json asked for"
SUMMARY = (
    "Write a small checkpoint in the published layout: a model of real widths with fewer layers and experts, and with "
    "random weights or those of a published folder; or a draft head with random weights."
)
EXAMPLE = (
    "kimi-jax make-toy /tmp/k2.5 --like k2.5 --layers 2 --experts 16\n"
    "  kimi-jax make-toy /tmp/k2 --like k2 --form fp8 --layers 2 --experts 8 --set vocab_size=2048\n"
    "  kimi-jax make-toy /tmp/cut --from ~/models/Kimi-K2.5 --layers 1\n"
    "  kimi-jax make-toy /tmp/head --head-for /tmp/k2.5 --head eagle3.1-mla"
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
    weights.add_argument(
        "--head-for", type=place, metavar="FOLDER", help="folder or URL of a model to make a draft head for"
    )
    parser.add_argument("--head", choices=HEADS, help="with --head-for: the kind of head (default eagle3.1-mla)")
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
        help="with --like or --head-for: change a field of config.json, like hidden_size=256; may be repeated",
    )
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, metavar="N", help="seed of the random weights (default 0)"
    )
    add_shard_size(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from checkpoints.toy import make_toy

    config = _model_config(arguments) if arguments.head_for is None else _head_config(arguments)
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


def _model_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the config.json of the model asked for. Raises what reading it would raise."""
    from checkpoints.published.quantization_config import describe_form
    from checkpoints.toy import cut_config, toy_config

    if arguments.head:
        raise ValueError("--head goes with --head-for")
    if arguments.source is not None and (arguments.form or arguments.fields):
        raise ValueError("--form and --set go with --like; with --from, the weights are as they are")
    if arguments.source is not None:
        config = json_reader.read_object(_config_file(arguments.source))
    else:
        config = toy_config(arguments.like, **dict(arguments.fields))
        if arguments.form:
            config = describe_form(config, arguments.form)
    config = cut_config(
        config, layers=arguments.layers, experts=arguments.experts, vision_layers=arguments.vision_layers
    )
    if arguments.source is None:
        config_json.from_dict(config, where=ASKED)  # refused here, not by who reads the folder
    return config


def _head_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the config.json of a draft head. Raises what reading it, and the model's, would raise."""
    from checkpoints.toy import head_config

    if arguments.form or arguments.layers or arguments.experts or arguments.vision_layers:
        raise ValueError("--form, --layers, --experts and --vision-layers are for models; a draft head has one layer")
    file = _config_file(arguments.head_for)
    values = json_reader.read_object(file)
    target = config_json.from_dict(values, where=str(file))
    config = head_config(values, arguments.head or HEADS[1], **dict(arguments.fields))
    config_json.fit_target(config_json.eagle_from_dict(config, where=ASKED), target, ASKED)
    return config


def _config_file(folder: "str | Path") -> "Place":
    from checkpoints.files.place import locate

    file = locate(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file
