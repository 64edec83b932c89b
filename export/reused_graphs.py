"""Graphs that another export of the same checkpoint has already: copied, not traced again.

Recipes change few graphs, and tracing the autoencoder takes most of the time of an export. The exporter is
deterministic, so the copied bytes are those that tracing would give.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from proteus_deploy.bundle import Bundle
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.stages import StageTable

__all__ = ["check_reusable", "copy_graph"]

_NOT_REUSED = ("quantization", "custom_operators")


def check_reusable(
    bundle: Bundle, checkpoint: Checkpoint, table: StageTable, dtype: str, versions: dict[str, str]
) -> None:
    """Raises InputError unless tracing would give the bundle's bytes again.

    versions: of the packages that decide them.
    """
    manifest = bundle.manifest
    for what, theirs, ours in (
        ("another checkpoint", manifest["checkpoint"]["hash"], checkpoint.hash),
        ("another control network", bundle.controlnet_hash, checkpoint.controlnet_hash),
        ("another dtype", bundle.dtype, dtype),
        ("other ranges", bundle.table, table),
        ("other versions", manifest["versions"], versions),
    ):
        if theirs != ours:
            shown = "" if what == "other ranges" else f" ({_short(theirs)}, here {_short(ours)})"
            raise InputError(
                f"graphs of {bundle.folder} can't be reused: it has {what}{shown}; leave --graphs-from "
                "out, or pass a bundle of the same checkpoint, flags and versions"
            )


def copy_graph(bundle: Bundle, name: str, folder: Path) -> dict[str, Any] | None:
    """Copy a graph's files into `folder` and return its record; None where the bundle's is another form.

    Those are quantised graphs, and those with operators of a plugin.
    """
    record: dict[str, Any] = bundle.manifest["graphs"][name]
    if any(field in record for field in _NOT_REUSED):
        return None
    for file in record["files"]:
        shutil.copyfile(bundle.folder / file, folder / Path(file).name)
    return dict(record)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:12]}…"
