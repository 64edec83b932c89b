"""Results of the text and identity stages, kept for the next request that would compute them again.

A result is found by what it follows from: the bytes of the stage's inputs, the weights, and what else decides
the bits (backend, precision, device, versions). So a hit is bit for bit what the stage would give, and
requests can share a cache without seeing one another.

Off unless a pipeline is given one: features of a person's face outlive no request that nobody asked to keep.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from proteus_deploy._files import atomic_file, check_writable, inside
from proteus_deploy.errors import InputError

__all__ = ["CacheCounts", "StageCache", "content_key"]

Outputs = dict[str, Tensor]

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_DEFAULT_FOLDER_BYTES = 4 << 30
_MAX_ENTRY_BYTES = 1 << 30  # far above any result of these stages at the published size


@dataclass(frozen=True)
class CacheCounts:
    """hits, of which folder_hits came from the disk; misses; entries and bytes in memory now."""

    hits: int
    folder_hits: int
    misses: int
    entries: int
    bytes: int


class StageCache:
    """Least recently used results go first. Safe to share between threads and pipelines.

    memory_bytes: budget of what is kept in main memory; 0 keeps nothing there.
    folder: None, or a folder that keeps results beyond the process; its files hold features of faces, and
        one made here is readable by its owner only. folder_bytes: its budget.
    Two threads that miss the same result at once both compute it, to the same bytes.

    Raises InputError for a budget that is no whole number from 0, or a folder that can't be written to.
    """

    def __init__(
        self,
        memory_bytes: int,
        *,
        folder: str | Path | None = None,
        folder_bytes: int = _DEFAULT_FOLDER_BYTES,
    ) -> None:
        self.memory_bytes = _budget("memory_bytes", memory_bytes)
        self._folder = (
            None if folder is None else _Folder(Path(folder), _budget("folder_bytes", folder_bytes))
        )
        self._lock = Lock()
        self._entries: OrderedDict[str, Outputs] = OrderedDict()
        self._bytes = 0
        self._hits = self._folder_hits = self._misses = 0

    def result(self, key: str, compute: Callable[[], Outputs], device: torch.device | str = "cpu") -> Outputs:
        """What `compute` gives, or the same bytes from an earlier call: a copy of them, on `device`."""
        found = self._from_memory(key)
        if found is None and self._folder is not None:
            found = self._folder.read(key)
            if found is not None:
                self._count(folder_hit=True)
                self._remember(key, found)
        if found is not None:
            return {name: value.to(device, copy=True) for name, value in found.items()}
        self._count(folder_hit=False)
        outputs = compute()
        kept = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in outputs.items()}
        self._remember(key, kept)
        if self._folder is not None:
            self._folder.write(key, kept)
        return outputs

    @property
    def counts(self) -> CacheCounts:
        with self._lock:
            return CacheCounts(self._hits, self._folder_hits, self._misses, len(self._entries), self._bytes)

    def clear(self) -> None:
        """Forget what is in memory and remove the entries of the folder."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
        if self._folder is not None:
            self._folder.clear()

    def _from_memory(self, key: str) -> Outputs | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self._hits += 1
            return found

    def _count(self, *, folder_hit: bool) -> None:
        with self._lock:
            self._hits += folder_hit
            self._folder_hits += folder_hit
            self._misses += not folder_hit

    def _remember(self, key: str, value: Outputs) -> None:
        size = _bytes_of(value)
        if size > self.memory_bytes:
            return
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = value
            self._bytes += size
            while self._bytes > self.memory_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= _bytes_of(oldest)


def content_key(stage: str, inputs: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """sha256 over stage, facts (weights, backend, …) and the name, dtype, shape and bytes of each input."""
    digest = hashlib.sha256()

    def add(*words: str) -> None:
        for word in words:
            data = word.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)

    add(stage)
    for name, fact in sorted(facts.items()):
        add(name, fact)
    for name, value in sorted(inputs.items()):
        add(name, str(value.dtype), str(list(value.shape)))
        digest.update(_raw(value))
    return digest.hexdigest()


def _raw(value: Tensor) -> bytes:
    # numpy has no bfloat16; bytes are bytes.
    flat: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat).tobytes()


def _bytes_of(value: Outputs) -> int:
    return sum(tensor.nbytes for tensor in value.values())


def _budget(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise InputError(f"{name} is {value!r}; a budget is a whole number of bytes from 0")
    return int(value)


class _Folder:
    """One safetensors file an entry, named by its key, with the sha256 of its content in its header.

    An entry is a copy of what can be computed again to the same bytes. So one that is damaged is no reason
    to stop: it is named in a warning, computed again and replaced.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"can't make the cache folder {folder} ({error.strerror}); choose another"
            ) from error
        check_writable(folder / f"entry{_SUFFIX}")
        self._folder = folder
        self._budget = budget

    def read(self, key: str) -> Outputs | None:
        file = inside(self._folder, f"{key}{_SUFFIX}")
        try:
            value = _read_entry(file, key)
            os.utime(file)  # the age of an entry is the time since its last use
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("the cache entry %s can't be used (%s); it is computed again", file, error)
            return None
        return value

    def write(self, key: str, value: Outputs) -> None:
        from safetensors.torch import save_file

        if _bytes_of(value) > min(self._budget, _MAX_ENTRY_BYTES):
            return
        file = inside(self._folder, f"{key}{_SUFFIX}")
        try:
            with atomic_file(file) as temporary:
                save_file(value, temporary, metadata={"content": content_key(key, value, {})})
            self._evict()
        except OSError as error:
            _log.warning("the cache entry %s can't be written (%s); the video is not affected", file, error)

    def clear(self) -> None:
        for file in self._folder.glob(f"*{_SUFFIX}"):
            file.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Remove entries, the one longest unused first, until the budget holds."""
        found = []
        for file in self._folder.glob(f"*{_SUFFIX}"):
            try:
                status = file.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found, key=lambda entry: entry[0]):
            if total <= self._budget:
                return
            file.unlink(missing_ok=True)
            total -= size


def _read_entry(file: Path, key: str) -> Outputs:
    """Raises ValueError for an entry that is not whole, OSError when it can't be read."""
    from safetensors import SafetensorError, safe_open

    if (size := file.stat().st_size) > _MAX_ENTRY_BYTES:
        raise ValueError(f"it has {size} bytes, an entry at most {_MAX_ENTRY_BYTES}")
    try:
        with safe_open(file, framework="pt") as handle:
            value = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            recorded = (handle.metadata() or {}).get("content")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if recorded != content_key(key, value, {}):
        raise ValueError("its content is not what was written")
    return value
