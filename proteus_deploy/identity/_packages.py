"""Optional packages of the face stack, imported when they are needed and never before."""

from __future__ import annotations

import importlib
from typing import Any

from proteus_deploy.errors import BackendError


def import_face_package(name: str) -> Any:
    """Import module `name` (cv2, insightface.app, onnxruntime) and return it.

    Raises BackendError with the install command when the package is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"reading a face needs {name.partition('.')[0]}, which can't be imported ({error}); "
            'run: pip install "proteus-deploy[face]"'
        ) from error
