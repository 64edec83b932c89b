"""What workers measured, added up for the metrics: stages, steps, batches, caches, memory."""

from __future__ import annotations

import resource
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Measures", "resident_bytes"]


def resident_bytes() -> int:
    """Main memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Measures:
    """Of all workers of this server since it started; safe to use from any thread.

    stage_seconds: by stage. steps: of all batches, each counted once for the whole batch. videos, batches,
    video_seconds: made. of_worker: the last word of each, by its number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stage_seconds: Counter[str] = Counter()
        self.steps = self.videos = self.batches = 0
        self.video_seconds = 0.0
        self.of_worker: dict[int, dict[str, Any]] = {}

    def add(self, worker: int, found: Mapping[str, Any]) -> None:
        """What a worker said after a batch; without "batch" it made none."""
        with self._lock:
            self.of_worker[worker] = dict(found)
            if "batch" in found:
                self.stage_seconds.update(found["stage_seconds"])
                self.steps += found["steps"]
                self.videos += found["batch"]
                self.batches += 1
                self.video_seconds += found["video_seconds"]
