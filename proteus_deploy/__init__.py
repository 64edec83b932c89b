"""Proteus-ID checkpoints as verified ONNX and TensorRT stages, and the videos they make.

Names of the public surface are loaded on first use: importing the package takes no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from proteus_deploy.errors import (
    AdapterError,
    BackendError,
    BundleError,
    Cancelled,
    CheckFailed,
    CheckpointError,
    ComputationError,
    InputError,
    PhotoError,
    ProteusError,
)

if TYPE_CHECKING:
    from proteus_deploy.control import Control
    from proteus_deploy.identity.features import IdentityFeatures
    from proteus_deploy.pipeline import Pipeline, StepEvent
    from proteus_deploy.request import GenerateRequest
    from proteus_deploy.video import Video

__all__ = [
    "AdapterError",
    "BackendError",
    "BundleError",
    "Cancelled",
    "CheckFailed",
    "CheckpointError",
    "ComputationError",
    "Control",
    "GenerateRequest",
    "IdentityFeatures",
    "InputError",
    "PhotoError",
    "Pipeline",
    "ProteusError",
    "StepEvent",
    "Video",
    "__version__",
]

__version__ = "0.1.0"

_LAZY = {
    "Control": "proteus_deploy.control",
    "GenerateRequest": "proteus_deploy.request",
    "IdentityFeatures": "proteus_deploy.identity.features",
    "Pipeline": "proteus_deploy.pipeline",
    "StepEvent": "proteus_deploy.pipeline",
    "Video": "proteus_deploy.video",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module the first time it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All names of the module, those not loaded yet included."""
    return sorted({*globals(), *__all__})
