"""Runs `kimi-jax verify`, which compares two checkpoints, or one with its checksums."""

import argparse
import dataclasses
import json
import sys

from kimi_jax.cli.arguments import add_limits, number, place, progress
from kimi_jax.cli.models import check_folder
from kimi_jax.cli.terminal import print_line

NAME = "verify"
SUMMARY = (
    "Compare two checkpoints, published or converted, tensor by tensor; or a converted one with the checksums of its "
    "conversion. The exit code is 1 if they differ."
)
EXAMPLE = (
    "kimi-jax verify ~/models/kimi-k2.5-orbax\n"
    "  kimi-jax verify ~/models/Kimi-K2.5 ~/models/kimi-k2.5-orbax\n"
    "  kimi-jax verify ~/models/kimi-k2-int4 ~/models/Kimi-K2 --tolerance 0.08"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=place, help="checkpoint's folder or URL")
    parser.add_argument("b", type=place, nargs="?", help="second checkpoint (default: the checksums in a)")
    parser.add_argument(
        "--tolerance",
        type=number(0.0, sys.float_info.max),
        metavar="X",
        help="compare values in any format; errors may be X times a tensor's largest value (default: compare bytes)",
    )
    add_limits(parser)


def run(arguments: argparse.Namespace) -> None:
    for path in (arguments.a, arguments.b):
        if path is not None:
            check_folder(path)
    import checkpoints

    with progress(arguments, "verifying") as show:
        verdict = checkpoints.verify(
            arguments.a,
            arguments.b,
            tolerance=arguments.tolerance,
            memory=arguments.memory,
            workers=arguments.workers,
            progress=show,
        )
    for finding in verdict.findings if arguments.json else verdict.problems:
        if arguments.json:
            print(json.dumps({"event": "tensor", **dataclasses.asdict(finding)}))
        else:
            print_line(f"{finding.name} {finding.problem}")
    against = "their checksums" if arguments.b is None else str(arguments.b)
    if verdict.problems:
        raise ValueError(f"{arguments.a}: {len(verdict.problems):,} of {len(verdict.findings):,} differ from {against}")
    if not arguments.json:
        worst = max(verdict.findings, key=lambda finding: finding.max_error)
        errors = f"; the largest error is {worst.max_error:.3g} of a weight's largest, in {worst.name}"
        print_line(
            f"{arguments.a}: {len(verdict.findings):,} tensors, none differs from {against}"
            + (errors if arguments.tolerance is not None else "")
        )
