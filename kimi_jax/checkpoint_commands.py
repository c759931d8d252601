"""The commands of `kimi-jax` that work on checkpoints' files: convert, export, verify, make-toy, inspect."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

FORMS = ("int4", "fp8", "bf16")


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`command(name, run, summary, example)` gives the parser of a new subcommand."""
    sub = command(
        "convert",
        _convert,
        "Turn a published safetensors folder into an Orbax checkpoint, INT4 kept, one chunk per expert. The same "
        "command goes on with a conversion that was stopped.",
        "kimi-jax convert ~/models/Kimi-K2.5 ~/models/kimi-k2.5-orbax --memory 4GiB",
    )
    sub.add_argument("src", help="folder or URL (gs://, s3://, hf://) with config.json and *.safetensors")
    sub.add_argument("dst", type=Path, help="folder to write")
    sub.add_argument(
        "--experts",
        choices=FORMS,
        help="form of the routed experts (default: as published, FP8 as bf16)",
    )
    sub.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of everything else (default: as published, FP8 as bfloat16)"
    )
    _add_limits(sub)
    sub.add_argument("--process-index", type=int, default=0, metavar="I", help="of several that share dst; from 0")
    sub.add_argument("--num-processes", type=int, default=1, metavar="N", help="that split one conversion (default 1)")

    sub = command(
        "export",
        _export,
        "Turn an Orbax checkpoint that convert wrote back into a published folder: safetensors, index, and the rest.",
        "kimi-jax export ~/models/kimi-k2.5-orbax ~/models/Kimi-K2.5-again",
    )
    sub.add_argument("src", type=Path, help="folder that convert wrote")
    sub.add_argument("dst", type=Path, help="folder to write; must not exist, or be empty")
    _add_shards(sub)
    _add_limits(sub)

    sub = command(
        "verify",
        _verify,
        "Hold two checkpoints against each other, published or converted, tensor by tensor; or a converted one against "
        "the checksums of its conversion. Exit code 1 where they differ.",
        "kimi-jax verify ~/models/kimi-k2.5-orbax\n"
        "  kimi-jax verify ~/models/Kimi-K2.5 ~/models/kimi-k2.5-orbax\n"
        "  kimi-jax verify ~/models/kimi-k2-int4 ~/models/Kimi-K2 --tolerance 0.08",
    )
    sub.add_argument("a", type=Path, help="a checkpoint's folder")
    sub.add_argument("b", type=Path, nargs="?", help="another one (default: the checksums of A)")
    sub.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="compare values, whatever the form: errors up to X times a weight's largest (default: every byte)",
    )
    _add_limits(sub)

    sub = command(
        "make-toy",
        _make_toy,
        "Write a checkpoint of real widths in the published layout, cut to a few layers and experts, with random "
        "weights or those of a published folder.",
        "kimi-jax make-toy /tmp/k2.5 --like k2.5 --layers 2 --experts 16\n"
        "  kimi-jax make-toy /tmp/k2 --like k2 --form fp8 --layers 2 --experts 8 --set vocab_size=2048",
    )
    sub.add_argument("dst", type=Path, help="folder to write; must not exist, or be empty")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--like", choices=["k2", "k2-thinking", "k2.5", "kimi-linear"], help="random weights of a model")
    what.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="the first weights of a published one")
    sub.add_argument("--layers", type=int, metavar="N", help="the first N (default: all)")
    sub.add_argument("--experts", type=int, metavar="N", help="the first N of each layer (default: all)")
    sub.add_argument("--vision-layers", type=int, metavar="N", help="the first N (default: all)")
    sub.add_argument("--form", choices=FORMS, help="with --like: of the weights (default: as released)")
    sub.add_argument(
        "--set",
        dest="fields",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="with --like: a field of config.json, like hidden_size=256; may be repeated",
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default 0)")
    _add_shards(sub)
    sub.add_argument("--json", action="store_true", help="progress as JSON, an object a line")

    sub = command(
        "inspect",
        _inspect,
        "Show what is in a checkpoint, published or converted, or in a preset: layers, dtypes, parameters, bytes.",
        "kimi-jax inspect ~/models/Kimi-K2.5\n  kimi-jax inspect --preset kimi-k2.5",
    )
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("path", type=Path, nargs="?", help="a checkpoint's folder")
    which.add_argument("--preset", metavar="NAME", help="a published model's configuration, no weights needed")


def _add_limits(sub: argparse.ArgumentParser) -> None:
    """What every long work on files has."""
    sub.add_argument("--memory", type=_nbytes, default="4GiB", metavar="SIZE", help="never exceeded (default 4GiB)")
    sub.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read and write (default 4)")
    sub.add_argument("--json", action="store_true", help="progress and result as JSON, an object a line")


def _add_shards(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--shard-size", type=_nbytes, default="5GB", metavar="SIZE", help="at most (default 5GB)")


def _field(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    try:
        if found and name:
            return name, json.loads(value)
    except json.JSONDecodeError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected FIELD=VALUE with a value as in JSON")


def _nbytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size like 4GiB or 500MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2])))


def _convert(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # which shapes a model has is all that is asked of it
    import checkpoints

    with _progress(arguments, "converting") as progress:
        report = checkpoints.convert(
            arguments.src,
            arguments.dst,
            experts=arguments.experts,
            dtype=arguments.dtype,
            memory=arguments.memory,
            workers=arguments.workers,
            process_index=arguments.process_index,
            num_processes=arguments.num_processes,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({"event": "converted", **dataclasses.asdict(report)}, default=str))
        return
    state = "was there already" if not report.made_bytes else f"{report.made_bytes:,} bytes written"
    if not report.whole:
        state += f"; the share of process {arguments.process_index} is done, others are still missing"
    elif report.made_bytes and report.found_bytes:
        state += f", {report.found_bytes:,} found from before"
    print(f"{report.destination}: {report.tensors:,} tensors in {report.leaves:,} leaves; {state}")
    if report.skipped:
        print(f"skipped {len(report.skipped)} tensors that the model does not use, like {report.skipped[0]}")


def _export(arguments: argparse.Namespace) -> None:
    import checkpoints

    with _progress(arguments, "exporting") as progress:
        report = checkpoints.export(
            arguments.src,
            arguments.dst,
            shard_bytes=arguments.shard_size,
            memory=arguments.memory,
            workers=arguments.workers,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({"event": "exported", **dataclasses.asdict(report)}, default=str))
        return
    print(
        f"{report.destination}: {report.tensors:,} tensors, {report.nbytes:,} bytes in {report.shards} shards; "
        f"carried along: {', '.join(report.carried)}"
    )


def _verify(arguments: argparse.Namespace) -> None:
    import checkpoints

    with _progress(arguments, "verifying") as progress:
        verdict = checkpoints.verify(
            arguments.a,
            arguments.b,
            tolerance=arguments.tolerance,
            memory=arguments.memory,
            workers=arguments.workers,
            progress=progress,
        )
    for finding in verdict.findings if arguments.json else verdict.problems:
        if arguments.json:
            print(json.dumps({"event": "tensor", **dataclasses.asdict(finding)}))
        else:
            print(f"{finding.name} {finding.problem}")
    against = "their checksums" if arguments.b is None else str(arguments.b)
    if verdict.problems:
        raise ValueError(f"{arguments.a}: {len(verdict.problems):,} of {len(verdict.findings):,} differ from {against}")
    if not arguments.json:
        worst = max(verdict.findings, key=lambda finding: finding.max_error)
        errors = f"; the largest error is {worst.max_error:.3g} of a weight's largest, in {worst.name}"
        print(
            f"{arguments.a}: {len(verdict.findings):,} tensors, none differs from {against}"
            + (errors if arguments.tolerance is not None else "")
        )


def _make_toy(arguments: argparse.Namespace) -> None:
    from checkpoints.quantization_config import described
    from checkpoints.toy import cut_config, make_toy, toy_config

    if arguments.source is not None and (arguments.form or arguments.fields):
        raise ValueError("--form and --set go with --like; with --from, the weights are as they are")
    if arguments.source is not None:
        config = json.loads((arguments.source / "config.json").read_text())
    else:
        preset = {"kimi-linear": "kimi-linear-48b"}.get(arguments.like, f"kimi-{arguments.like}")
        config = toy_config(preset, **dict(arguments.fields))
        if arguments.form:
            config = described(config, arguments.form)
    config = cut_config(
        config, layers=arguments.layers, experts=arguments.experts, vision_layers=arguments.vision_layers
    )
    with _progress(arguments, "writing") as progress:
        folder = make_toy(
            arguments.dst,
            config,
            seed=arguments.seed,
            source=arguments.source,
            shard_bytes=arguments.shard_size,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(json.dumps({"event": "written", "destination": str(folder), "nbytes": size}) if arguments.json
          else f"{folder}: {size:,} bytes")  # fmt: skip


def _progress(arguments: argparse.Namespace, what: str) -> Any:
    import checkpoints

    return checkpoints.progress_events(what) if arguments.json else checkpoints.progress_bar(what)


def _inspect(arguments: argparse.Namespace) -> None:
    import checkpoints
    from kimi_jax import config_json

    if arguments.preset is not None:
        summary = checkpoints.summary_of_config(config_json.preset(arguments.preset))
    else:
        summary = checkpoints.summary(arguments.path)
    Console().print(checkpoints.table(summary))
