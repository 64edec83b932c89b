"""A command in a process of its own, ended before it takes the memory that the machine needs for others."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy.export import host_memory

__all__ = ["Limits", "Outcome", "run_limited"]

_INTERVAL_S = 0.2
_SHOWN = 600  # characters of standard error in a reason


@dataclass(frozen=True)
class Limits:
    """anonymous_bytes: what the process may hold, mapped files left out. left_bytes: what the machine keeps.

    timeout_s: seconds of wall time.
    """

    anonymous_bytes: int
    left_bytes: int = 2 << 30
    timeout_s: float = 3600.0


@dataclass(frozen=True)
class Outcome:
    """result: the JSON object on the last line of standard output, None without success.

    reason: why there is none, "" with one. The peaks were looked at five times a second: resident memory
    holds the mapped parts of files, which the kernel can drop; anonymous memory doesn't. None where /proc
    doesn't say.
    """

    result: dict[str, Any] | None
    reason: str
    seconds: float
    peak_resident_bytes: int | None
    peak_anonymous_bytes: int | None


def run_limited(command: Sequence[str], limits: Limits) -> Outcome:
    """Run a command of ours to its end, or kill it at the first limit that it passes."""
    started = time.monotonic()
    resident: int | None = None
    anonymous: int | None = None
    reason = ""
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while True:
            try:
                # Both pipes are read meanwhile, so that a child which writes much doesn't stand still.
                output, errors = child.communicate(timeout=_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                resident = _larger(resident, _held(child.pid, "VmHWM"))
                anonymous = _larger(anonymous, held := _held(child.pid, "RssAnon"))
                reason = reason or _passed(held, time.monotonic() - started, limits)
                if reason:
                    child.kill()
    seconds = round(time.monotonic() - started, 1)
    if not reason and child.returncode != 0:
        reason = f"exit code {child.returncode}: {errors.strip()[-_SHOWN:]}"
    result = None if reason else json.loads(output.strip().splitlines()[-1])
    return Outcome(result, reason, seconds, resident, anonymous)


def _passed(held: int | None, seconds: float, limits: Limits) -> str:
    """The limit that is passed, as a reason; "" for none."""
    if held is not None and held > limits.anonymous_bytes:
        return (
            f"killed at {held / 2**30:.1f} GiB of memory; the limit was {limits.anonymous_bytes / 2**30:.1f}"
        )
    free = host_memory.available()
    if free is not None and free.available < limits.left_bytes:
        return (
            f"killed with {(held or 0) / 2**30:.1f} GiB in use, when {free.limited_by} had only "
            f"{free.available / 2**30:.1f} GiB left"
        )
    if seconds > limits.timeout_s:
        return f"killed after {limits.timeout_s:.0f} s"
    return ""


def _held(process: int, field: str) -> int | None:
    """Bytes of a field of /proc/PID/status; None when the process is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    words = next((line.split() for line in text.splitlines() if line.startswith(f"{field}:")), None)
    return None if words is None else 1024 * int(words[1])


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
