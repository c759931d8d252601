"""Chooses whom `chat` and `agent` work with: a model in this process, run by an engine, or one on a server."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from kimi_jax.cli.arguments import add_draft, add_mesh, mesh_of, place
from kimi_jax.cli.models import SMALL, check_draft, check_folder, small_model
from kimi_jax.cli.starting import add_compile_cache, compiling, keep_programs, load_draft, load_model

# A CPU compiles each program for seconds: pieces of one length need half as many of them as longer ones.
PREFILL_CHUNK, CPU_PREFILL_CHUNK = 512, 16
KEY_VARIABLES = ("KIMI_JAX_API_KEY", "OPENAI_API_KEY")
# Flags of a model in this process
_HERE = ("draft", "mesh", "dtype", "cache_memory")


def add_place(parser: argparse.ArgumentParser, parse: Callable[[str], Any] = place) -> None:
    """Adds the folder or URL, which `parse` makes of a word, and `--model`."""
    parser.add_argument(
        "path",
        type=parse,
        nargs="?",
        metavar="FOLDER|URL",
        help="a checkpoint's folder, converted or published, or a server's http:// address (default: the small model)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="small model of the package, like digits; with a URL, the server's name for it"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of how a model runs here, and the key for a server."""
    add_draft(parser)
    add_mesh(parser)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of weights and activations (default: as stored)"
    )
    parser.add_argument(
        "--cache-memory", metavar="SIZE", help="memory of each device for the cache, like 8GiB (default: what is left)"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"key for a server (default: {' or '.join(KEY_VARIABLES)})")
    add_compile_cache(parser)


def server_of(arguments: argparse.Namespace, here: tuple[str, ...] = ()) -> str | None:
    """Returns the URL of the server that is meant; None where a model in this process is, whose folder
    `arguments.path` then is.

    here: further flags that a server does not take. Raises ValueError or FileNotFoundError where the flags contradict
    one another, and where the folder is not there.
    """
    if isinstance(arguments.path, str):
        if urlsplit(arguments.path).scheme not in ("http", "https"):
            raise ValueError(f"{arguments.path}: expected a folder on this machine, or a server's http:// address")
        given = [f"--{name.replace('_', '-')}" for name in (*_HERE, *here) if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: for a model in this process, not for one on a server")
        return arguments.path
    if arguments.path is not None and arguments.model is not None:
        raise ValueError("--model goes without a folder: it names a small model, or one of a server's")
    if arguments.path is None:
        arguments.path = small_model(arguments.model or SMALL)
    check_folder(arguments.path)
    check_draft(arguments.draft)
    return None


def server_address(url: str) -> str:
    """Returns the address that the client takes: `/v1` is added where the URL has no path."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def server_key(arguments: argparse.Namespace) -> str:
    """Returns the key that is sent to a server: that of `--api-key`, else that of the environment."""
    named = (os.environ[name] for name in KEY_VARIABLES if os.environ.get(name))
    return arguments.api_key or next(named, "none")


@contextlib.contextmanager
def engine_of(arguments: argparse.Namespace, slots: int = 1) -> Iterator[tuple[Any, Any]]:
    """Loads the model of `arguments.path`, and yields an engine that answers `slots` requests at a time, and a
    `Processor`."""
    import jax

    from kimi_jax.cli.console import console
    from kimi_jax.engine import Engine
    from kimi_jax.processor import Processor

    log, kept = console(stderr=True), keep_programs(arguments)
    processor = Processor.from_folder(arguments.path)
    mesh = mesh_of(arguments.mesh, processor.config)
    draft = load_draft(arguments, processor.config, mesh)
    model = load_model(arguments, mesh)
    chunk = CPU_PREFILL_CHUNK if jax.default_backend() == "cpu" else PREFILL_CHUNK
    with compiling(log, kept) as name:
        engine = Engine(
            model,
            slots=slots,
            cache_memory=arguments.cache_memory,
            prefill_chunk=chunk,
            progress=name,
            draft=draft,
            draft_tokens=arguments.draft_tokens,
        )
    with engine:
        yield engine, processor
