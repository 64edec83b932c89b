"""Files that are either whole or absent: atomic writes, hashes, paths kept inside a folder."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from proteus_deploy.errors import InputError

_TEMPORARY_MARK = ".partial-"
_HASH_BLOCK_BYTES = 1 << 20
_HASH_THREADS = 4
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """`$PROTEUS_DEPLOY_CACHE/<name>`, or `proteus_deploy/<name>` in the user's cache folder (XDG)."""
    if own := os.environ.get("PROTEUS_DEPLOY_CACHE"):
        return Path(own) / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "proteus_deploy" / name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    A process killed at any moment leaves the old file or the new one, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY_MARK}{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`.

    With `replace`, a folder that is already there trades places with the new one once that is whole, so
    that a process killed at any moment leaves the old folder or the new one (see publish_directory).
    What killed processes left of earlier attempts at the same folder is removed.
    Raises InputError when `path` already exists, is not an empty folder, and `replace` is not set.
    """
    path = path.resolve() if path.is_symlink() else path  # the folder is replaced, not the link to it
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and (not replace or not path.is_dir()):
        raise InputError(f"{path} already exists and is not empty; choose another folder or remove it")
    prefix = f"{_TEMPORARY_MARK}{path.name}-{os.getpid()}-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    except OSError as error:
        raise InputError(f"can't write in {path.parent} ({error.strerror}); choose another folder") from error
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(0o755)
        publish_directory(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def publish_directory(temporary: Path, path: Path) -> None:
    """Let the whole folder `temporary` become `path`; the folder that was there gets the temporary's name.

    One step where the file system can exchange two names. Elsewhere two renames: a process killed
    between them leaves nothing at `path`.
    """
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        old = Path(tempfile.mkdtemp(prefix=f"{temporary.name}-", dir=path.parent))
        os.replace(path, old)
        os.replace(temporary, path)
        os.replace(old, temporary)
    _sync_directory(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the file system or the C library can't."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one))


def _remove_abandoned(path: Path) -> None:
    """Remove temporary folders of `path` whose process is gone."""
    prefix = f"{_TEMPORARY_MARK}{path.name}-"
    for folder in path.parent.glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        if folder.is_dir() and owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def without_nan(document: Any) -> Any:
    """The document with NaN and infinities as None: JSON has no word for them."""
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, Mapping):
        return {key: without_nan(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [without_nan(value) for value in document]
    return document


def check_writable(path: Path) -> None:
    """Raise InputError now when a file at `path` could not be written later.

    Looks at the nearest folder that exists; makes nothing that stays.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write {path}: {folder} ({error.strerror}); choose another place") from error


def write_json(path: Path, document: Any) -> None:
    """Write `document` as sorted, indented JSON, atomically; NaN and infinities become null."""
    with atomic_file(path) as temporary:
        text = json.dumps(
            without_nan(document), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks of one MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_files(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, sha256) of files in `folder`, in order; threads share the work, hashing leaves the lock."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        yield from zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when the result (links followed) is not under `folder`.

    Raises InputError for absolute names and for names that climb out with `..`.
    """
    candidate = (folder / name).resolve()
    if not candidate.is_relative_to(folder.resolve()):
        raise InputError(f"{name!r} points outside {folder}; only files inside the folder are read")
    return candidate
