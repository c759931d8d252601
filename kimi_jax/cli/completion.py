"""Runs `kimi-jax completion`, which prints a script that completes commands and flags in a shell."""

import argparse

NAME = "completion"
SUMMARY = "Print a script that completes commands and flags in a shell. The examples say how to put it to use."
EXAMPLE = (
    "kimi-jax completion bash > ~/.local/share/bash-completion/completions/kimi-jax\n"
    '  kimi-jax completion zsh > "${fpath[1]}/_kimi-jax"\n'
    '  eval "$(kimi-jax completion bash)"  # for this shell alone'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="shell that reads the script")


def run(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError:
        raise ValueError("completion needs shtab: pip install 'kimi-jax[completion]'") from None
    from kimi_jax.cli import command_parser

    print(shtab.complete(command_parser(listed=True), arguments.shell))
