"""Progress of one video, phase by phase, and Ctrl-C between its steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Literal, Self

from proteus_deploy.cli.progress import Progress
from proteus_deploy.errors import Cancelled

if TYPE_CHECKING:
    from proteus_deploy.pipeline import ProgressEvent, StepEvent

_PREPARATION = ("identity", "text", "schedule")


class VideoProgress:
    """Context manager around `Pipeline.generate`: pass its `on_step` and `on_progress`.

    steps: denoising steps of the request. Each of them is reported with its seconds.
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self._steps = steps
        self._quiet = quiet
        self._current = self._progress("preparing", len(_PREPARATION), "part")

    def _progress(self, text: str, total: int | None, unit: str) -> Progress:
        # No interval: a line for each step is what tells a slow run from one that hangs.
        return Progress(text, total, unit=unit, quiet=self._quiet, interval_s=0)

    def __enter__(self) -> Self:
        self._current.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current.__exit__(kind, error, trace)

    def _begin(self, text: str, total: int | None, unit: str) -> None:
        self._current.__exit__(None, None, None)
        self._current = self._progress(text, total, unit)
        self._current.__enter__()

    def on_step(self, event: StepEvent) -> None:
        """Count one denoising step."""
        self._current.advance(1, f"this step {event.seconds:.2f} s")

    def on_progress(self, event: ProgressEvent) -> None:
        """Count the parts of the other phases, and move on from one to the next."""
        last = event.done == event.total
        if event.phase in _PREPARATION:
            if last:
                self._current.advance(1, event.phase)
            if last and event.phase == _PREPARATION[-1]:
                self._begin("denoising", self._steps, "step")
        elif event.phase == "denoise":
            if last:
                self._begin("decoding", None, "part")
        else:
            self._current.advance(1, f"{event.done}/{event.total}")


@contextmanager
def cancel_on_interrupt(*, second: Literal["raise", "kill"] = "raise") -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; a second one interrupts at once.

    second: "raise" a KeyboardInterrupt, or let the signal "kill" the process: for work in C++ code, which
    would drop the exception. Only for work that a killed process can't damage.
    Cancelled becomes KeyboardInterrupt where Ctrl-C was its cause, so that the exit code says so.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        if second == "kill":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _say_stopping()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    except Cancelled as error:
        if event.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _say_stopping() -> None:
    # Past the stream's buffer: the signal may have come while a line was being written to it.
    with suppress(OSError, ValueError, AttributeError):
        descriptor = sys.stderr.fileno()
        os.write(descriptor, ("\n" if os.isatty(descriptor) else "").encode() + "stopping…\n".encode())
