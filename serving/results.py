"""Finished videos: one file per attempt, published by the commit that names it in the database.

Beside a video lies the portrait that was drawn for it, where one was: it has the video's name, and its fate.

A file that no row names is an orphan: of an attempt that was killed between its file and its commit, or of a
job that was deleted. `sweep` removes them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from proteus_deploy._files import atomic_file, inside, sha256_of
from proteus_deploy.serving.jobs import Claim, JobNotFound, JobResult

__all__ = [
    "RESULT_NAME",
    "ResultFolder",
    "Results",
    "portrait_name",
    "video_name",
    "with_portraits",
    "write_file",
]

RESULT_NAME = re.compile(r"video_[0-9a-f]{32}-[0-9]+\.(mp4|png)")


def video_name(claim: Claim) -> str:
    """Of the file of an attempt."""
    return f"{claim.job.id}-{claim.attempt}.mp4"


def portrait_name(name: str) -> str:
    """Of the portrait beside a video."""
    return f"{name.removesuffix('.mp4')}.png"


class Results(Protocol):
    """Where finished videos lie: a `ResultFolder`, or `shared_results.SharedResults`."""

    def write(
        self, claim: Claim, save: Callable[[Path], None], facts: dict[str, object] | None = None
    ) -> JobResult:
        """Let `save` write the file; whole and stored when this returns, and not yet published."""

    def write_portrait(self, claim: Claim, png: bytes) -> None:
        """Store the portrait of a video whose own file comes next; where that fails, `remove` the two."""

    def path(self, name: str) -> Path:
        """Where a published result lies on this machine. Raises JobNotFound when the file is gone."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove results and their portraits; those that are gone already are no error."""

    def sweep(self, published: Callable[[], set[str]], *, older_than_s: float = 0.0) -> list[str]:
        """Remove leftovers and results that no row names; their names.

        older_than_s: younger files stay, for workers that go on while this one starts.
        published: names in the database, read after the folder, so that what is published meanwhile stays.
        """


def with_portraits(names: Iterable[str]) -> set[str]:
    """The names, and for each that is a video's that of its portrait."""
    names = set(names)
    return names | {portrait_name(name) for name in names if name.endswith(".mp4")}


def write_file(path: Path, save: Callable[[Path], None], facts: dict[str, object] | None) -> JobResult:
    """`path` as `save` writes it, whole and on the disk when this returns."""
    with atomic_file(path) as temporary:
        named = temporary.with_name(temporary.name + path.suffix)  # encoders go by the suffix
        try:
            save(named)
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)
    return JobResult(path.name, path.stat().st_size, sha256_of(path), dict(facts or {}))


class ResultFolder:
    """A folder of finished videos."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self, claim: Claim, save: Callable[[Path], None], facts: dict[str, object] | None = None
    ) -> JobResult:
        """See `Results`."""
        return write_file(inside(self._folder, video_name(claim)), save, facts)

    def write_portrait(self, claim: Claim, png: bytes) -> None:
        """See `Results`."""
        with atomic_file(inside(self._folder, portrait_name(video_name(claim)))) as temporary:
            temporary.write_bytes(png)

    def path(self, name: str) -> Path:
        """See `Results`."""
        path = inside(self._folder, name)
        if not path.is_file():
            raise JobNotFound("the file is gone from the server's data folder")
        return path

    def remove(self, names: Iterable[str]) -> None:
        """See `Results`."""
        for name in with_portraits(names):
            inside(self._folder, name).unlink(missing_ok=True)

    def sweep(self, published: Callable[[], set[str]], *, older_than_s: float = 0.0) -> list[str]:
        """See `Results`."""
        limit = time.time() - older_than_s
        found = [
            file
            for file in sorted(self._folder.iterdir())
            if file.is_file()
            and (RESULT_NAME.fullmatch(file.name) or file.name.startswith(".partial-"))
            and file.stat().st_mtime <= limit
        ]
        kept = with_portraits(published())
        orphans = [file.name for file in found if file.name not in kept]
        self.remove(orphans)
        return orphans
