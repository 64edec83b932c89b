"""The `proteus-deploy` command: finds the subcommand, runs it, turns errors into exit codes.

A command is one module of this package with `NAME`, `HELP`, `add_arguments(parser)` and
`run(arguments) -> exit code`. All of them are imported at start, so they import nothing heavy at their top.

Exit codes: 0 done, 1 a check or the machine failed, 2 the input is wrong, 130 interrupted, 141 the reader
of standard output went away.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from proteus_deploy import __version__
from proteus_deploy.errors import ProteusError

COMMAND_MODULES = (
    "inspect",
    "export",
    "build",
    "verify",
    "generate",
    "portrait",
    "serve",
    "bench",
    "tune",
    "calibrate",
    "evaluate",
    "train",
    "personalize",
    "demo",
    "convert",
)

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class Command(Protocol):
    """What a command module has to offer."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own flags on `parser`."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work; return the exit code or raise a ProteusError."""


def load_commands() -> dict[str, Command]:
    """Command name -> module, in the order in which help lists them."""
    modules = [cast(Command, import_module(f"proteus_deploy.cli.{name}")) for name in COMMAND_MODULES]
    return {module.NAME: module for module in modules}


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The whole command line: the common flags, then one subparser per command."""
    parser = argparse.ArgumentParser(
        prog="proteus-deploy",
        description="Export Proteus-ID checkpoints to ONNX and TensorRT, verify them, make videos with them.",
    )
    parser.add_argument("--version", action="version", version=f"proteus-deploy {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        # SUPPRESS: an absent flag here must not undo `proteus-deploy --debug COMMAND`.
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.add_arguments(subparser)
    return parser


def _refuse_unknown_command(
    parser: argparse.ArgumentParser, argv: Sequence[str], names: Sequence[str]
) -> None:
    """Exit with 2 and the nearest name when the first word of `argv` is no command.

    The flags before a command take no value, so the first word without a dash is the command.
    """
    word = next((argument for argument in argv if not argument.startswith("-")), None)
    if word is None or word in names:
        return
    nearest = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the commands are {', '.join(names)}"
    parser.error(f"there is no command {word!r}; {hint}")


def _report(message: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)


def _open_closed_streams() -> None:
    """A stream that the shell closed (`>&-`) is None; what is written to it goes nowhere from here on."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _run(command: Command, arguments: argparse.Namespace) -> int:
    debug: bool = arguments.debug
    try:
        code = command.run(arguments)
        sys.stdout.flush()  # a closed pipe must show up here, not while the interpreter shuts down
    except ProteusError as error:
        _report(str(error), debug=debug)
        return error.exit_code
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that flush has to have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _report(f"{error} (--debug shows where)", debug=debug)
        return EXIT_FAILED
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    argparse itself exits (SystemExit) for --help, --version and a malformed command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _open_closed_streams()
        commands = load_commands()
        parser = build_parser(commands)
        _refuse_unknown_command(parser, words, list(commands))
        arguments = parser.parse_args(words)
        return _run(commands[arguments.command], arguments)
    except KeyboardInterrupt:
        _report("interrupted", debug="--debug" in words)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
