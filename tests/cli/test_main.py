"""The command line: exit codes, messages, suggestions; with commands of this file's own."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from proteus_deploy import __version__
from proteus_deploy.cli import main as cli
from proteus_deploy.errors import BundleError, Cancelled, CheckFailed, InputError, ProteusError


@dataclass
class FakeCommand:
    """A command whose work is one function."""

    NAME: str
    work: Callable[[argparse.Namespace], int]
    HELP: str = "do something for a test"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=1)

    def run(self, arguments: argparse.Namespace) -> int:
        return self.work(arguments)


def _raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def work(_: argparse.Namespace) -> int:
        raise error

    return work


def _use(monkeypatch: pytest.MonkeyPatch, work: Callable[[argparse.Namespace], int]) -> None:
    commands: dict[str, cli.Command] = {name: FakeCommand(name, work) for name in ("export", "build")}
    monkeypatch.setattr(cli, "load_commands", lambda: commands)


def test_each_command_module_keeps_the_contract() -> None:
    commands = cli.load_commands()
    assert list(commands) == list(cli.COMMAND_MODULES)
    for name, command in commands.items():
        assert re.fullmatch(r"[a-z]+", name)
        assert command.HELP
        assert not command.HELP.endswith(".")
        command.add_arguments(argparse.ArgumentParser())
        assert callable(command.run)


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_of_the_command_is_returned(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    _use(monkeypatch, lambda _: code)
    assert cli.main(["export"]) == code


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, lambda arguments: int(arguments.steps))
    assert cli.main(["build", "--steps", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProteusError("x failed"), 1),
        (InputError("x failed"), 2),
        (BundleError("x failed"), 2),
        (CheckFailed("x failed"), 1),
        (Cancelled("x failed"), 1),
        (OSError(28, "No space left on device", "out.onnx"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    _use(monkeypatch, _raising(error))
    assert cli.main(["export"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--debug", "export"], ["export", "--debug"]])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    _use(monkeypatch, _raising(InputError("height is 7")))
    assert cli.main(argv) == 2
    assert "Traceback" in (err := capsys.readouterr().err)
    assert err.endswith("error: height is 7\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["export"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["exprot"], "there is no command 'exprot'; did you mean 'export'?"),
        (["--debug", "biuld", "x"], "did you mean 'build'?"),
        (["zzz"], "the commands are export, build"),
        ([], "required: COMMAND"),
        (["export", "--steps", "many"], "invalid int value: 'many'"),
        (["export", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_malformed_command_line_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    _use(monkeypatch, lambda _: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _use(monkeypatch, lambda _: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"proteus-deploy {__version__}\n"


def test_reader_that_goes_away_is_not_a_traceback(tmp_path: Path) -> None:
    """`proteus-deploy … | head -1`, with a command that prints more than a pipe holds."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from proteus_deploy.cli import main as cli\n"
        "class Long:\n"
        "    NAME, HELP = 'long', 'print much'\n"
        "    def add_arguments(self, parser): pass\n"
        "    def run(self, arguments):\n"
        "        for _ in range(200_000): print('line')\n"
        "        return 0\n"
        "cli.load_commands = lambda: {'long': Long()}\n"
        "sys.exit(cli.main(['long']))\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "line\n"
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait() == cli.EXIT_BROKEN_PIPE


def test_interrupt_while_the_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> dict[str, cli.Command]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_commands", interrupted)
    assert cli.main(["export"]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path: Path, closed: str) -> None:
    """Results and errors of a command whose shell closed its standard streams."""
    program = Path(sys.executable).parent / "proteus-deploy"
    for words, code in (("--version", 0), (f"inspect {tmp_path}", 2)):
        done = subprocess.run(
            ["sh", "-c", f"{program} {words} {closed}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        if "2>" in closed:
            assert "error" not in done.stdout


def test_installed_entry_point_runs() -> None:
    program = Path(sys.executable).parent / "proteus-deploy"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"proteus-deploy {__version__}\n"
