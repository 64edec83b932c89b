"""The folder of a demo: what an earlier one left is used again, what no demo wrote is not touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint

__all__ = ["clear", "kept_checkpoint"]

_MARK = "demo.json"
_KIND = "proteus_deploy demo"
_OWN = ("checkpoint", "bundle", "encoders", "photo.png", "verification.json", "verification.md", "video.mp4")


def kept_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that an earlier demo left in `folder`, if one did.

    Raises InputError when `folder` is a file, when something there has a name of the demo's and no demo
    wrote it, and when the checkpoint was changed since.
    """
    from proteus_deploy.checkpoint import Checkpoint

    checkpoint, wrote = folder / "checkpoint", _written_hash(folder)
    if wrote is None or not checkpoint.exists():
        return None
    kept = Checkpoint.open(checkpoint)
    if kept.hash != wrote:
        raise InputError(
            f"{checkpoint} was changed after the demo wrote it; move it away, or choose another --output-dir"
        )
    return kept


def clear(folder: Path, *, checkpoint: str) -> None:
    """Remove what an earlier demo made, and note that a demo writes here; `checkpoint`: hash of its own."""
    from proteus_deploy._files import write_json

    for name in _OWN:
        _remove(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _MARK, {"kind": _KIND, "checkpoint": checkpoint})


def _written_hash(folder: Path) -> str | None:
    """The hash of the checkpoint that an earlier demo wrote; None where there was none."""
    from proteus_deploy.weights import read_json

    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output-dir is {folder}, which is not a folder; choose another name")
    if (folder / _MARK).is_file():
        mark = read_json(folder / _MARK)
        if mark.get("kind") == _KIND:
            return str(mark.get("checkpoint"))
    foreign = [name for name in _OWN if (folder / name).exists()]
    if foreign:
        raise InputError(
            f"{folder / foreign[0]} is there and no earlier demo wrote it; choose another --output-dir"
        )
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Out of its name in one step: killed half way, no part of a folder stands for the whole.
        doomed = path.with_name(f".partial-{path.name}-{os.getpid()}-old")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
