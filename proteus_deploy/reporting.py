"""The one shape of a progress callback: report(phase, done, total)."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]


def no_report(*_: object) -> None:
    """For callers that don't look."""
