"""Progress on a terminal, in a log, and not at all."""

from __future__ import annotations

import io

import pytest

from proteus_deploy.cli.progress import PhaseProgress, Progress


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


def test_phases_follow_each_other() -> None:
    stream = io.StringIO()
    with PhaseProgress(stream=stream) as report:
        report("export", 0, 2)
        report("export", 2, 2)
        report("export", 2, 2)  # said twice, counted once
        report("parity", 1, 1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "export: started, 2 parts"
    assert lines[1].startswith("export: done, 2 parts in ")
    assert lines[2] == "parity: started, 1 part"
    assert lines[3].startswith("parity: done, 1 part in ")
    assert len(lines) == 4


def test_phase_that_comes_again_starts_again() -> None:
    stream = io.StringIO()
    with PhaseProgress(stream=stream) as report:
        for phase in ("verify", "video", "verify"):
            report(phase, 1, 1)
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == [
        *["verify"] * 2,
        *["video"] * 2,
        *["verify"] * 2,
    ]


def test_error_says_in_which_phase_it_stopped() -> None:
    stream = io.StringIO()

    def work() -> None:
        with PhaseProgress(stream=stream) as report:
            report("export", 3, 8)
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        work()
    assert stream.getvalue().splitlines()[-1].startswith("export: stopped at 3/8 parts after ")


def test_phases_without_a_word() -> None:
    stream = FakeTerminal()
    with PhaseProgress(quiet=True, stream=stream) as report:
        report("export", 1, 2)
    with PhaseProgress(stream=stream):
        pass  # nothing was ever reported
    assert stream.getvalue() == ""


def test_phases_on_a_terminal_are_bars() -> None:
    stream = FakeTerminal()
    with PhaseProgress(stream=stream) as report:
        report("export", 2, 2)
        report("parity", 3, 3)
    assert "2/2" in stream.getvalue()
    assert "3/3" in stream.getvalue()
