"""Finished videos where every server reaches them: a mounted folder, or an object store through fsspec.

An upload need not be atomic: nobody asks for a file before the commit that names it, and a part of one is an
orphan like any other. A video that is asked for is fetched into a folder of this machine first, so ranges,
conditional requests and slow clients are the same as with a local file.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file, inside
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.serving.jobs import Claim, JobNotFound, JobResult
from proteus_deploy.serving.results import (
    RESULT_NAME,
    ResultFolder,
    Results,
    portrait_name,
    video_name,
    with_portraits,
    write_file,
)

__all__ = ["SharedResults", "open_results"]

_KEPT_BYTES = 2 << 30  # of fetched videos, on each machine


def open_results(url: str | None, folder: Path) -> Results:
    """Results in `folder`, or at a URL that fsspec knows (file:///mnt/videos, s3://bucket/prefix).

    `folder` then holds copies of what was made or asked for here.

    Raises InputError for a URL that can't be shared or written, BackendError when its package is missing.
    """
    if url is None:
        return ResultFolder(folder)
    import fsspec

    protocol, _, rest = url.partition("://")
    if not rest or protocol == "memory":
        raise InputError(
            f"results can't be kept at {url!r}; write file:///folder, s3://bucket/prefix, or another URL of "
            "fsspec that all servers reach"
        )
    try:
        # Listings of others' files must not be remembered.
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise BackendError(
            f"results at {protocol}:// need a package that isn't installed: {error}"
        ) from error
    except ValueError as error:
        raise InputError(f"results can't be kept at {url!r}: {error}") from error
    probe = f"{root.rstrip('/')}/.probe-{secrets.token_hex(8)}"
    try:
        if protocol == "file":  # with an object store this would make a bucket of a slip of the pen
            files.makedirs(root, exist_ok=True)
        files.pipe_file(probe, b"")
        files.rm_file(probe)
    except Exception as error:
        raise InputError(f"results can't be written at {url!r}: {type(error).__name__}: {error}") from error
    return ResultFolder(Path(root)) if protocol == "file" else SharedResults(files, root, folder)


class SharedResults:
    """See `Results`. Methods raise OSError when the store doesn't answer."""

    def __init__(self, files: Any, root: str, folder: Path, *, kept_bytes: int = _KEPT_BYTES) -> None:
        """files: an fsspec filesystem. folder: for copies, of which about `kept_bytes` stay."""
        self._files, self._root, self._folder, self._kept_bytes = files, root.rstrip("/"), folder, kept_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self, claim: Claim, save: Callable[[Path], None], facts: dict[str, object] | None = None
    ) -> JobResult:
        """See `Results`."""
        copy = inside(self._folder, video_name(claim))
        result = write_file(copy, save, facts)
        self._files.put_file(str(copy), self._key(copy.name))
        self._forget_old(copy)
        return result

    def write_portrait(self, claim: Claim, png: bytes) -> None:
        """See `Results`; copies of portraits come here when they are asked for."""
        self._files.pipe_file(self._key(portrait_name(video_name(claim))), png)

    def path(self, name: str) -> Path:
        """See `Results`."""
        copy = inside(self._folder, name)
        try:
            os.utime(copy)
        except FileNotFoundError:
            self._fetch(copy)
            self._forget_old(copy)
        return copy

    def _fetch(self, copy: Path) -> None:
        try:
            with atomic_file(copy) as temporary:
                self._files.get_file(self._key(copy.name), str(temporary))
        except FileNotFoundError:
            raise JobNotFound("the file is gone from the shared storage") from None

    def remove(self, names: Iterable[str]) -> None:
        """See `Results`."""
        for name in with_portraits(names):
            inside(self._folder, name).unlink(missing_ok=True)
            try:
                self._files.rm_file(self._key(name))
            except FileNotFoundError:
                continue

    def sweep(self, published: Callable[[], set[str]], *, older_than_s: float = 0.0) -> list[str]:
        """See `Results`."""
        limit = time.time() - older_than_s
        found: list[str] = []
        with suppress(FileNotFoundError):  # an object store has no empty folders
            found = [str(key).rsplit("/", 1)[-1] for key in self._files.ls(self._root, detail=False)]
        kept = with_portraits(published())
        # A store is asked for the age of each file, so only of those that may have to go.
        orphans = [
            name
            for name in sorted(set(found) - kept)
            if RESULT_NAME.fullmatch(name) and self._stored_s(name) <= limit
        ]
        self.remove(orphans)
        return orphans

    def _stored_s(self, name: str) -> float:
        try:
            return float(self._files.modified(self._key(name)).timestamp())
        except FileNotFoundError:  # another server has removed it meanwhile
            return float("inf")

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _forget_old(self, used: Path) -> None:
        """Remove the copies that were used longest ago, but not the one at hand."""
        copies = []
        for file in chain(self._folder.glob("*.mp4"), self._folder.glob("*.png")):
            with suppress(FileNotFoundError):  # the other processes of this server do the same
                found = file.stat()
                copies.append((file == used, found.st_mtime, found.st_size, file))
        room = self._kept_bytes
        for at_hand, _, size, file in sorted(copies, reverse=True):
            room -= size
            if room < 0 and not at_hand:
                file.unlink(missing_ok=True)
