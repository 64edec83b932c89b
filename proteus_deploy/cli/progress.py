"""Progress of long work on standard error: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO


class Progress:
    """Context manager that counts `total` pieces of work.

    On a terminal it is a tqdm bar. Elsewhere (a log, a pipe) it writes one line at the start, at most one
    every `interval_s` seconds, and one at the end that says how long it took or where it stopped.

    Args:
        text: what is being done, e.g. "exporting".
        total: number of pieces; None where it isn't known.
        unit: singular word for a piece, e.g. "step".
        quiet: write nothing at all.
        stream: where to write; standard error as it is on entering, unless given.
        interval_s: least time in seconds between two plain lines.
        clock: source of time in seconds.
    """

    def __init__(
        self,
        text: str,
        total: int | None = None,
        *,
        unit: str = "step",
        quiet: bool = False,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.text = text
        self.total = total
        self.unit = unit
        self.quiet = quiet
        self.done = 0
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._bar: Any = None
        self._started_s = 0.0
        self._last_line_s = 0.0

    def __enter__(self) -> Self:
        self._started_s = self._last_line_s = self._clock()
        stream = self._stream = self._stream or sys.stderr
        if self.quiet:
            return self
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, desc=self.text, unit=self.unit, file=stream, dynamic_ncols=True
            )
        else:
            self._line("started" if self.total is None else f"started, {self._count(self.total)}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet:
            if kind is None:
                self._line(f"done, {self._count(self.done)} in {self._elapsed_s():.1f} s")
            else:
                self._line(f"stopped at {self._position()} after {self._elapsed_s():.1f} s")

    def advance(self, n: int = 1, text: str | None = None) -> None:
        """Count `n` more pieces; `text` says what is being worked on now."""
        self.done += n
        if self.quiet:
            return
        if self._bar is not None:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
            return
        now_s = self._clock()
        if now_s - self._last_line_s >= self._interval_s:
            self._last_line_s = now_s
            note = f", {text}" if text else ""
            self._line(f"{self._position()} after {self._elapsed_s():.1f} s{note}")

    def _count(self, number: int) -> str:
        return f"{number} {self.unit}" if number == 1 else f"{number} {self.unit}s"

    def _position(self) -> str:
        return self._count(self.done) if self.total is None else f"{self.done}/{self._count(self.total)}"

    def _elapsed_s(self) -> float:
        return self._clock() - self._started_s

    def _line(self, message: str) -> None:
        print(f"{self.text}: {message}", file=self._stream, flush=True)


class PhaseProgress:
    """Turns `report(phase, done, total)` calls into one Progress after another.

    Phases may be of unknown number; a new name closes the one before it. Use as a context manager and
    pass the object itself as the callback. unit: singular word for a piece of every phase.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, unit: str = "part") -> None:
        self._quiet = quiet
        self._stream = stream
        self._unit = unit
        self._phase: str | None = None
        self._current: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._current is not None:
            self._current.__exit__(kind, error, trace)
            self._current = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.__exit__(None, None, None)
            self._phase = phase
            self._current = Progress(
                phase, total, unit=self._unit, quiet=self._quiet, stream=self._stream
            ).__enter__()
        if self._current is not None and done > self._current.done:
            self._current.advance(done - self._current.done)
