"""The painter that a folder holds."""

from __future__ import annotations

from pathlib import Path

from proteus_deploy.portrait.janus import JanusPainter, is_janus
from proteus_deploy.portrait.onnx_bundle import is_portrait_bundle
from proteus_deploy.portrait.onnx_painter import OnnxPainter
from proteus_deploy.portrait.painter import Painter, TorchPainter

__all__ = ["open_painter"]


def open_painter(folder: str | Path, *, device: str = "cpu", hashes: bool = True) -> Painter:
    """Open a portrait checkpoint, a portrait bundle, or a Janus checkpoint of transformers.

    hashes: False leaves the sha256 of a bundle out, for files that were checked already.
    Raises CheckpointError or BundleError for a folder that is none of them, naming the file or entry at
    fault.
    """
    if is_portrait_bundle(folder):
        return OnnxPainter.open(folder, device=device, hashes=hashes)
    if is_janus(folder):
        return JanusPainter(folder, device=device)
    return TorchPainter.open(folder, device=device)
