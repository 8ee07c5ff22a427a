"""The command line ``gen3r-engine``: one module per command.

Exit codes: 0 done, 1 failed, 2 wrong input (one line says what and how to mend), 130 interrupted by
Ctrl-C, 143 ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from gen3r_engine.cli import bench, doctor, eval, export, prepare, run, train, verify, view, warmup
from gen3r_engine.cli.errors import UsageError, one_line
from gen3r_engine.cli.signals import exit_code, sigterm_unwinds, told

COMMANDS = {
    **{"run": run, "view": view, "warmup": warmup, "verify": verify, "doctor": doctor},
    "bench": bench,
    "eval": eval,
    "export": export,
    "prepare": prepare,
    "train": train,
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="gen3r-engine",
        description="Photos or a video in, a 3D scene out.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gen3r-engine {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="show tracebacks of errors"
        )
    return parser


def _version() -> str:
    try:
        return metadata.version("gen3r-engine")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (the process's arguments when None); returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, the version or the error
        return int(stop.code or 0)
    try:
        with sigterm_unwinds():
            return COMMANDS[args.command].main(args)
    except KeyboardInterrupt as stop:
        print(told(stop), file=sys.stderr)
        return exit_code(stop)
    except BrokenPipeError:
        # The reader of our output went away (`gen3r-engine doctor | head`): nothing to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        if args.verbose:
            traceback.print_exc()
        text = "; ".join([one_line(error), *getattr(error, "__notes__", ())])
        print(f"error: {text}", file=sys.stderr)
        return error.code
