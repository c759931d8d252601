"""Runs `kimi-jax trace`: what the agents of a run did, as a table and as a picture."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_jax.cli.arguments import local
from kimi_jax.printable import printable

if TYPE_CHECKING:
    from kimi_jax.agents.timeline import AgentRecord, Timeline

NAME = "trace"
SUMMARY = (
    "Show what the agents of a run did, from the file that `agent --trace-out` writes: steps, calls of tools, tokens "
    "and how many of them were cached. The file of a run that still goes on, or was killed, will do."
)
EXAMPLE = (
    "kimi-jax trace run.jsonl\n  kimi-jax trace run.jsonl --plot run.png\n  kimi-jax trace run.jsonl --plot run.svg"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=local, metavar="FILE", help="a trace: JSON lines")
    parser.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw each agent's time, with the longest chain of steps marked: a .png or .svg",
    )


def run(arguments: argparse.Namespace) -> None:
    try:
        from kimi_jax.agents.timeline import read_timeline
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kimi-jax[agents]'") from None
    from kimi_jax.cli.console import console

    found = read_timeline(arguments.path)
    if not found.agents:
        raise ValueError(f"{printable(arguments.path)}: the trace has no events")
    console().print(_table(found))
    log = console(stderr=True)
    if not found.is_whole:
        log.print("the trace does not reach the end of the run", markup=False)
    if arguments.plot is not None:
        _plot(found, arguments.plot, arguments.path.name)
        log.print(f"{printable(arguments.plot)}: written", markup=False, highlight=False)


def _plot(found: "Timeline", path: Path, name: str) -> None:
    """Writes the picture, which is whole or not there."""
    from kimi_jax.agents import gantt

    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        gantt.draw(found, new, printable(name, 60))
        new.replace(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'kimi-jax[plot]'") from None
    finally:
        new.unlink(missing_ok=True)


def _table(found: "Timeline") -> Any:
    from rich.table import Table
    from rich.text import Text

    from kimi_jax.agents import Usage

    agents = list(found.agents.values())
    critical = set(found.critical_path)
    table = Table(
        title=f"{len(agents)} agents, {found.critical_steps} steps in the longest chain (*)",
        title_justify="left",
        show_footer=len(agents) > 1,
        box=None,
        pad_edge=False,
    )
    usage = sum((agent.usage for agent in agents), Usage())
    totals = (
        "all",
        sum(len(agent.steps) for agent in agents),
        sum(len(agent.calls) for agent in agents),
        sum(agent.failed for agent in agents),
        *_tokens(usage),
        f"{max(agent.end for agent in agents):.1f}",
        "",
    )
    names = ("agent", "steps", "calls", "failed", "prompt", "cached", "new", "seconds", "end")
    for name, total in zip(names, totals, strict=True):
        left = name in ("agent", "end")
        table.add_column(name, footer=str(total), justify="left" if left else "right", overflow="fold")
    for agent in agents:
        table.add_row(*(Text(cell) for cell in _cells(agent, agent.name in critical)))
    return table


def _cells(agent: "AgentRecord", is_critical: bool) -> tuple[str, ...]:
    return (
        printable(agent.name, 60) + " *" * is_critical,
        str(len(agent.steps)),
        str(len(agent.calls)),
        str(agent.failed),
        *_tokens(agent.usage),
        f"{agent.end - agent.begin:.1f}",
        "still at work" if agent.stop is None else printable(agent.stop, 30),
    )


def _tokens(usage: Any) -> tuple[str, str, str]:
    share = f"{usage.cached / usage.prompt:.0%}" if usage.prompt else "-"
    return f"{usage.prompt:,}", share, f"{usage.completion:,}"


def _picture(text: str) -> Path:
    path = local(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{printable(text)!r}, expected a name that ends in .png or .svg")
    return path
