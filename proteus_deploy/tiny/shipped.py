"""The trained tiny model and the networks that measure it: files of this package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from proteus_deploy.errors import CheckpointError

__all__ = ["tiny_encoders", "tiny_model"]


def tiny_model() -> Path:
    """The folder of the tiny model, a checkpoint in the published layout. Read only: copy it to change it.

    Raises CheckpointError when the package was installed without its data.
    """
    return _folder("model", "model_index.json")


def tiny_encoders() -> Path:
    """The folder of the tiny networks behind the measures, for `evaluate --encoders`."""
    return _folder("encoders", "perceptual.safetensors")


def _folder(name: str, file: str) -> Path:
    folder = Path(str(files("proteus_deploy.tiny"))) / name
    if not (folder / file).is_file():
        raise CheckpointError(
            f"{folder} lacks {file}, which is part of this package; install the package again"
        )
    return folder
