"""Loads models and compiles programs for commands, and says how far that is; compiled programs are kept on disk."""

import argparse
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from kimi_jax.cli.models import PROMPT_LOOKUP

# Seconds of compilation from which a program is kept: reading one takes some hundredths.
KEPT_FROM_S = 0.3


def add_compile_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-compile-cache",
        dest="compile_cache",
        action="store_false",
        help="keep no compiled programs on disk (default: in the user's cache folder, or JAX_COMPILATION_CACHE_DIR)",
    )


def keep_programs(arguments: argparse.Namespace) -> str:
    """Turns JAX's compilation cache on, if `--no-compile-cache` is not given. Returns where programs are kept, in words
    that follow "compiling", and "" where they are not.

    What JAX's own variables say (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) goes before.
    """
    import jax

    config: Any = jax.config  # whose attributes are not declared
    if not arguments.compile_cache or not config.jax_enable_compilation_cache:
        config.update("jax_enable_compilation_cache", False)
        return ""
    if config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "programs" / host_kind()
        config.update("jax_compilation_cache_dir", str(folder))
        config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM_S)
    folder = Path(config.jax_compilation_cache_dir)
    is_first = not (folder.is_dir() and any(folder.iterdir()))
    return f" ({'first time; ' if is_first else ''}kept in {folder})"


def cache_folder() -> Path:
    """Returns the folder for what can be made again: `XDG_CACHE_HOME` or ~/.cache, and `kimi-jax` in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-jax"


def host_kind() -> str:
    """Returns a name that hosts with one kind of processor share: a home folder may be on many, and a CPU's programs
    have instructions that another one lacks."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def load_model(arguments: argparse.Namespace, mesh: Any, **options: Any) -> Any:
    """Loads the model of `arguments.path` under a bar of bytes, rate and time left, with `--dtype`."""
    import checkpoints

    with checkpoints.progress_bar("loading") as show:
        return checkpoints.load(arguments.path, mesh=mesh, dtype=arguments.dtype, progress=show, **options)


def load_draft(arguments: argparse.Namespace, config: Any, mesh: Any) -> Any:
    """Returns what `--draft` names, for the `draft` of an engine: a head, loaded for the model of a `KimiConfig`, or
    `PromptLookup`; None without the flag. Called before the model is loaded, it refuses a head of another model first.
    """
    if arguments.draft is None:
        return None
    import checkpoints
    from kimi_jax.runtime.drafts import PromptLookup

    if arguments.draft == PROMPT_LOOKUP:
        return PromptLookup
    with checkpoints.progress_bar("loading the draft head") as show:
        return checkpoints.load_head(arguments.draft, config, mesh, arguments.dtype, progress=show)


@contextmanager
def compiling(log: Console, kept: str) -> Iterator[Callable[[str], None]]:
    """Says what is compiled and for how many seconds, until the context is left; yields a function to name programs.

    `kept` is what `keep_programs` returned. A terminal has one line for it, which goes away; elsewhere there is a line
    for each program.
    """
    began, named = time.perf_counter(), 0
    columns = (TimeElapsedColumn(), TextColumn("{task.description}", markup=False))  # a narrow terminal cuts the end
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal or log.quiet) as bar:
        task = bar.add_task(f"compiling{kept}", total=None)

        def name(program: str) -> None:
            nonlocal named
            named += 1
            bar.update(task, description=f"compiling {program}{kept}")
            if not log.is_terminal:
                seconds = time.perf_counter() - began
                log.print(f"compiling after {seconds:.1f} s: {program}{kept if named == 1 else ''}", markup=False)

        yield name
    if named:
        log.print(f"compiled {named} programs in {time.perf_counter() - began:.1f} s", highlight=False)
