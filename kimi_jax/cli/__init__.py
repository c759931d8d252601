"""Runs the `kimi-jax` command. Each subcommand is a module here: its arguments, and a few lines that call a function.

Exit codes: 0 done, also when the reader of the output has gone; 1 refused or failed (one line on standard error says
why, `--trace` shows where); 2 wrong usage; 130 interrupted; 143 terminated.
"""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import NoReturn, Protocol

from kimi_jax.cli import convert, demo, export, failures, generate, inspect, make_toy, plan, serve, train, verify
from kimi_jax.printable import printable

DESCRIPTION = "Run Moonshot's Kimi models in JAX: convert, inspect and verify published checkpoints, and generate text."
EPILOG = "`kimi-jax COMMAND --help` lists a command's flags and shows an example."


class Command(Protocol):
    """Lists the names that the module of a command has."""

    NAME: str
    SUMMARY: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> None: ...


COMMANDS: tuple[Command, ...] = (convert, export, verify, make_toy, inspect, generate, serve, train, plan, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` leaves out the program's name; None reads the process's own.

    Raises SystemExit for `--help`, wrong usage and SIGTERM, and no other exception.
    """
    trace = False
    with failures.one_line_warnings(), failures.sigterm_exits():
        try:
            arguments = _parser().parse_args(argv)
            trace = arguments.trace
            arguments.run(arguments)
            failures.flush_output()
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            return failures.report(error, trace)
        finally:
            failures.drop_unwritten_output()
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message, failures.LINE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("kimi-jax", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=textwrap.fill(command.SUMMARY, max(shutil.get_terminal_size().columns - 2, 40)),
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--trace", action="store_true", help="after an error, show where in the code it was raised")
        sub.set_defaults(run=command.run)
    return parser
