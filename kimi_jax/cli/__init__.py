"""Runs the `kimi-jax` command. Each subcommand is a module here: its arguments, and a few lines that call a function.

Exit codes: 0 done, also when the reader of the output has gone; 1 refused or failed (one line on standard error says
why, `--trace` shows where); 2 wrong usage; 3 ended by a limit of `agent`; 130 interrupted; 143 terminated.
"""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from kimi_jax.cli import (
    agent,
    chat,
    completion,
    convert,
    demo,
    env,
    export,
    failures,
    generate,
    inspect,
    make_toy,
    plan,
    serve,
    trace,
    train,
    verify,
)
from kimi_jax.printable import printable

DESCRIPTION = "Run Moonshot's Kimi models in JAX: talk with them, serve them, convert, train and plan."


class Command(Protocol):
    """Lists the names that the module of a command has."""

    NAME: str
    SUMMARY: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> None: ...


# Each group's commands, with what they do in eight words or less.
GROUPS: dict[str, dict[Command, str]] = {
    "talk": {
        chat: "Talk with a model in the terminal",
        agent: "Work on a task with tools until answered",
        generate: "Answer one prompt, or a file of them",
        trace: "Show what the agents of a run did",
        serve: "Serve a model to clients over HTTP",
    },
    "prepare": {
        convert: "Turn published weights into a fast checkpoint",
        verify: "Compare checkpoints, tensor by tensor",
        export: "Turn a checkpoint back into published files",
        inspect: "Show a model's layers, parameters and bytes",
        train: "Fine-tune a model on conversations",
    },
    "plan": {
        plan: "Find which slices fit a model, how fast",
    },
    "try": {
        demo: "Watch a small model go all the way",
        make_toy: "Write a small model with random weights",
        env: "Show versions, devices, memory and settings",
        completion: "Print a script for your shell's completion",
    },
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` leaves out the program's name; None reads the process's own.

    Raises SystemExit for `--help`, wrong usage, a limit of `agent` and SIGTERM, and no other exception.
    """
    show_trace = False
    with failures.one_line_warnings(), failures.sigterm_exits():
        try:
            arguments = command_parser().parse_args(argv)
            show_trace = arguments.trace
            arguments.run(arguments)
            failures.flush_output()
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            return failures.report(error, show_trace)
        finally:
            failures.drop_unwritten_output()
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message, failures.LINE))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints the version, which is looked up only here."""
        from importlib.metadata import version

        print(f"kimi-jax {version('kimi-jax')}")
        parser.exit()


def command_parser(*, listed: bool = False) -> argparse.ArgumentParser:
    """Returns the parser of the whole command line. With `listed`, argparse has a list of the commands too, which shtab
    reads; for people they stand in their groups."""
    parser = _Parser(
        "kimi-jax", description=DESCRIPTION, epilog=_overview(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands", help="one of those below")
    width = max(shutil.get_terminal_size().columns - 2, 40)
    phrases = {command.NAME: phrase for group in GROUPS.values() for command, phrase in group.items()}
    for command in COMMANDS:
        listing: dict[str, Any] = {"help": phrases[command.NAME]} if listed else {}
        sub = commands.add_parser(
            command.NAME,
            **listing,
            description=textwrap.fill(command.SUMMARY, width),
            epilog=f"examples:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--trace", action="store_true", help="after an error, show where in the code it was raised")
        sub.set_defaults(run=command.run)
    return parser


def _overview() -> str:
    """Returns the list of commands in their groups."""
    lines = []
    for name, group in GROUPS.items():
        lines += [name, *(f"  {command.NAME:<11} {phrase}" for command, phrase in group.items()), ""]
    return "\n".join([*lines, "`kimi-jax COMMAND --help` lists a command's flags and shows examples."])
