"""The painter that a folder holds."""

from __future__ import annotations

from pathlib import Path

from proteus_deploy.portrait.painter import Painter, TorchPainter

__all__ = ["open_painter"]


def open_painter(folder: str | Path, *, device: str = "cpu") -> Painter:
    """Open a portrait checkpoint.

    Raises CheckpointError for a folder that is none, naming the file or entry at fault.
    """
    return TorchPainter.open(folder, device=device)
