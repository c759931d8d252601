"""Defines arguments that several commands have, and the types of all arguments, which refuse values out of range."""

import argparse
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kimi_jax import json_reader
from kimi_jax.cli.models import PROMPT_LOOKUP
from kimi_jax.printable import printable

FORMS = ("int4", "mxfp4", "fp8", "bf16")
HEADS = ("eagle3-mla", "eagle3.1-mla", "eagle3-llama")
INT32_MAX = 2**31 - 1
SEED_MAX = 2**32 - 1  # the largest seed of `jax.random.key`


def whole(low: int, high: int = INT32_MAX) -> Callable[[str], int]:
    """Returns the parser of a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text) and low <= int(text) <= high:
            return int(text)
        raise _refused(text, f"a whole number from {low:,} to {high:,}")

    return parse


def part(text: str) -> tuple[int, int]:
    """Parses "I/N", number I of N parts, counted from 0."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise _refused(text, "I/N with I from 0 to N - 1, like 0/4")


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Returns the parser of a number from `low` (with `above`, of a number above `low`) to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and not (above and value == low):
            return value
        raise _refused(
            text, f"a number {'above' if above else 'from'} {low:g}{' and at most' if above else ' to'} {high:g}"
        )

    return parse


def nbytes(text: str) -> int:
    """Parses a size like 4GiB or 500MB, from one byte to an exabyte."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMGT])(i?)B", text)
    size = 0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2]))
    if not 1 <= size <= 1e18:
        raise _refused(text, "a size like 4GiB or 500MB, above 0 and at most 1,000,000TB")
    return int(size)


def seconds(text: str) -> float:
    """Parses a time like 90s, 10m or 2h, from a second to a year."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", text)
    length = 0.0 if found is None else float(found[1]) * {"s": 1, "m": 60, "h": 3_600}[found[2]]
    if not 1 <= length <= 365 * 24 * 3_600:
        raise _refused(text, "a time like 90s, 10m or 2h, from a second to a year")
    return length


def place(text: str) -> Path | str:
    """Returns the path of a local folder or file, which a `file://` URL may name; returns any other URL unchanged."""
    scheme, found, _ = text.partition("://")
    if not found:
        return Path(text)
    if scheme.lower() != "file":
        return text
    url = urlsplit(text)
    if url.netloc not in ("", "localhost") or url.query or url.fragment or not url.path:
        raise _refused(text, "file:// and the absolute path of a folder on this machine, like file:///models/kimi")
    return Path(unquote(url.path))


def local(text: str) -> Path:
    """Returns the path of a folder or file on this machine; refuses URLs of other machines."""
    found = place(text)
    if isinstance(found, str):
        raise _refused(text, "a path on this machine")
    return found


def field(text: str) -> tuple[str, Any]:
    """Parses FIELD=VALUE, where the value is JSON."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise _refused(text, "FIELD=VALUE with a value as in JSON")
    try:
        return name, json_reader.parse(value, name)
    except json_reader.JSONError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected FIELD=VALUE with a value as in JSON") from None


def preset(text: str) -> str:
    """Returns the whole name of the published model that `text` names; refuses others, with the nearest."""
    from kimi_jax import config_json

    try:
        return config_json.preset_name(text)
    except config_json.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def host_and_port(text: str) -> str:
    """Returns `text` if it is HOST:PORT; refuses it otherwise."""
    if re.fullmatch(r"\S+:[0-9]{1,5}", text) and 0 < int(text.rpartition(":")[2]) < 2**16:
        return text
    raise _refused(text, "HOST:PORT with a port from 1 to 65,535")


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{printable(text)!r}, expected {expected}")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of long work on files: memory, threads, and progress as JSON."""
    parser.add_argument(
        "--memory",
        type=nbytes,
        default="4GiB",
        metavar="SIZE",
        help="most memory the process may use, like 500MB or 4GiB (default 4GiB)",
    )
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=4, metavar="N", help="threads that read and write (default 4)"
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print progress and result as JSON, one object per line")


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size", type=nbytes, default="5GB", metavar="SIZE", help="largest size of a shard (default 5GB)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how tokens are drawn. Those not given are None: see `sampling_of`."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--greedy", action="store_true", help="always take the most likely token (default: draw, as the next flags say)"
    )
    how.add_argument(
        "--temperature",
        type=number(0.0, 1000.0),
        metavar="T",
        help="0 is greedy (default, here and in the next three flags: what generation_config.json says, else what "
        "Moonshot recommends: 1.0 with thinking, 0.6 without)",
    )
    parser.add_argument("--top-k", type=whole(0), metavar="K", help="draw from the K most likely tokens (0: all)")
    parser.add_argument(
        "--top-p",
        type=number(0.0, 1.0, above=True),
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (recommended: 0.95; 1: all)",
    )
    parser.add_argument(
        "--min-p",
        type=number(0.0, 1.0),
        metavar="P",
        help="draw from tokens with at least P times the best one's probability (0: all)",
    )


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the flags of `add_sampling` that are given."""
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return given | ({"temperature": 0.0} if arguments.greedy else {})


def sampling_of(arguments: argparse.Namespace, folder: Path | str, thinking: bool) -> Any:
    """Returns the `Sampling` of the flags, where they say nothing that of the checkpoint in `folder`, and where that
    says nothing what is recommended for its mode."""
    from kimi_jax.runtime.sampling import Sampling

    default = Sampling.from_folder(folder, Sampling.recommended(thinking))
    return dataclasses.replace(default, **given_sampling(arguments))


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of drafts: see `starting.load_draft`."""
    parser.add_argument(
        "--draft",
        type=lambda text: text if text == PROMPT_LOOKUP else place(text),
        metavar=f"HEAD|{PROMPT_LOOKUP}",
        help="verify several tokens of an answer at a time, without changing it: those that an Eagle3 head drafts, in "
        f"a folder or at a URL, or with {PROMPT_LOOKUP} those that followed where the last ones occurred before "
        "(default: one at a time)",
    )
    parser.add_argument(
        "--draft-tokens", type=whole(1, 7), default=4, metavar="N", help="most drafts at a time, 1 to 7 (default 4)"
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        metavar="MESH",
        help="devices over data, expert, tensor and sequence, like 1x1x8x1 or tensor=8; `auto` shares all devices out "
        "by the model's heads (default: one device)",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that several processes run together: see `joined`."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes that run this command together; needs --mesh. A TPU pod, GKE or Slurm "
        "says who they are, elsewhere the next three flags do",
    )
    parser.add_argument(
        "--coordinator", type=host_and_port, metavar="HOST:PORT", help="address where process 0 listens"
    )
    parser.add_argument("--num-processes", type=whole(1), metavar="N", help="number of processes on all hosts together")
    parser.add_argument(
        "--process-id", type=whole(0), metavar="I", help="number of this process, 0 to N-1; process 0 prints or serves"
    )


def joined(arguments: argparse.Namespace, on_failure: Callable[[str], Any] | None = None) -> Any:
    """Returns a context that yields the `Links` with the other processes, None without `--distributed`.

    on_failure: see `kimi_jax.processes.joined`.

    Raises ValueError where the flags of `add_processes` do not go together.
    """
    who = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed:
        if who != (None, None, None):
            raise ValueError("--coordinator, --num-processes and --process-id go with --distributed")
        return contextlib.nullcontext()
    if arguments.mesh is None:
        raise ValueError("--distributed needs --mesh: the devices of all processes, and what they split")
    from kimi_jax import processes

    return processes.joined(*who, on_failure=on_failure)


def mesh_of(shape: str | None, config: Any) -> Any:
    """Returns the mesh that `--mesh` names for the model of a `KimiConfig`, None where there is none."""
    import jax

    from sharding import default_shape, make_mesh

    if shape is None:
        return None
    devices, heads = len(jax.devices()), config.text.num_attention_heads
    return make_mesh(default_shape(devices, heads) if shape == "auto" else shape)


def progress(arguments: argparse.Namespace, activity: str) -> Any:
    """Returns a context manager that reports progress of the `activity`: JSON lines with `--json`, a bar otherwise."""
    import checkpoints

    return checkpoints.progress_events(activity) if arguments.json else checkpoints.progress_bar(activity)
