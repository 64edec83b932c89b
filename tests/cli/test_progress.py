"""Progress on a terminal, in a log, and not at all."""

from __future__ import annotations

import io

import pytest

from proteus_deploy.cli.progress import Progress


class FakeClock:
    """A clock that the test moves, in seconds."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_few() -> None:
    stream, clock = io.StringIO(), FakeClock()
    with Progress("exporting", 39, unit="layer", stream=stream, interval_s=5, clock=clock) as progress:
        for index in range(39):
            clock.now_s += 0.25
            progress.advance(text=f"block {index}")
    assert stream.getvalue().splitlines() == [
        "exporting: started, 39 layers",
        "exporting: 20/39 layers after 5.0 s, block 19",
        "exporting: done, 39 layers in 9.8 s",
    ]


def test_first_and_last_line_without_a_total() -> None:
    stream = io.StringIO()
    with Progress("hashing", unit="file", stream=stream) as progress:
        progress.advance()
        progress.advance(3)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "hashing: started"
    assert lines[-1].startswith("hashing: done, 4 files in ")


def test_error_says_where_it_stopped() -> None:
    stream, clock = io.StringIO(), FakeClock()

    def work() -> None:
        with Progress("denoising", 4, stream=stream, clock=clock) as progress:
            progress.advance()
            clock.now_s += 2
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        work()
    assert stream.getvalue().splitlines()[-1] == "denoising: stopped at 1/4 steps after 2.0 s"


def test_one_is_singular() -> None:
    stream = io.StringIO()
    with Progress("building", 1, unit="engine", stream=stream):
        pass
    assert stream.getvalue().startswith("building: started, 1 engine\n")


def test_terminal_gets_a_bar() -> None:
    stream = FakeTerminal()
    with Progress("denoising", 3, stream=stream) as progress:
        for _ in range(3):
            progress.advance(text="cfg")
    assert "3/3" in stream.getvalue()
    assert "started" not in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), FakeTerminal()], ids=["log", "terminal"])
def test_quiet_writes_nothing_but_counts(stream: io.StringIO) -> None:
    with Progress("denoising", 3, quiet=True, stream=stream) as progress:
        progress.advance(2)
    assert progress.done == 2
    assert stream.getvalue() == ""


def test_default_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("denoising", 1) as progress:
        progress.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 2
