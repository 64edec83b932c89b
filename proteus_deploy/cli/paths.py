"""What a path on the command line is: a checkpoint, a bundle, or a file from one of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from proteus_deploy.cli.progress import PhaseProgress
from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle

Kind = Literal["bundle", "checkpoint"]

_MARKS: tuple[tuple[str, Kind], ...] = (("manifest.json", "bundle"), ("model_index.json", "checkpoint"))
_SLOW_BYTES = 2 << 30  # about a second of hashing
_MAX_PARENTS = 4  # engines/<target>/<graph>.engine is three below its bundle


def kind_of(path: Path) -> Kind:
    """Say whether `path` is a bundle or a checkpoint, by the file that every one of them has.

    Raises InputError for anything else; for a file or folder inside one, with the folder to pass instead.
    """
    found = _kind_here(path)
    if found is not None and (found == "checkpoint" or not _is_engine_folder(path)):
        return found
    if not path.exists():
        raise InputError(f"{path} does not exist; pass the folder of a checkpoint or of a bundle")
    what = "a file" if path.is_file() else "a folder without model_index.json or manifest.json"
    for folder in list(path.absolute().parents)[:_MAX_PARENTS]:
        kind = _kind_here(folder)
        if kind is not None and not _is_engine_folder(folder):
            raise InputError(f"{path} is {what}, a part of the {kind} {folder}; pass that folder")
    if path.is_file():
        raise InputError(
            f"{path} is {what}; a checkpoint is a folder with model_index.json in it, "
            "a bundle one with manifest.json"
        )
    raise InputError(f"{path} is {what}: neither a checkpoint nor a bundle")


def open_bundle(path: Path) -> Bundle:
    """Open and check a bundle; with progress where reading it takes more than a moment."""
    from proteus_deploy.bundle import Bundle

    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    with PhaseProgress(quiet=size < _SLOW_BYTES) as report:
        return Bundle.open(path, report=report)


def _kind_here(path: Path) -> Kind | None:
    return next((kind for name, kind in _MARKS if (path / name).is_file()), None)


def _is_engine_folder(path: Path) -> bool:
    """Engines have a manifest of their own, two folders below the bundle's."""
    return path.absolute().parent.name == "engines"
