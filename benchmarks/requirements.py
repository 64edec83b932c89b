"""What a candidate needs besides the package's own dependencies: looked for before anything is exported."""

from __future__ import annotations

import os
import shutil
from importlib import import_module

from proteus_deploy.errors import BackendError

__all__ = ["require_packages"]

# backend -> (package, extra of ours that brings it)
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "openvino")}
_TENSORRT = ("tensorrt_rtx", "tensorrt")


def require_packages(backend: str, device: str) -> None:
    """Raise BackendError, with the command that installs it, for the first thing that is missing."""
    if backend in _PACKAGES:
        package, extra = _PACKAGES[backend]
        if not _is_there(package):
            raise BackendError(f'{package} is not installed; pip install "proteus-deploy[{extra}]"')
    if backend == "tensorrt" and not any(_is_there(package) for package in _TENSORRT):
        raise BackendError(
            'tensorrt is not installed; pip install "proteus-deploy[tensorrt]" or '
            '"proteus-deploy[tensorrt-rtx]", run `proteus-deploy build` on a bundle, and pass that'
        )
    if backend.endswith("-triton") and not _is_there("triton"):
        raise BackendError('triton is not installed; pip install "proteus-deploy[triton]"')
    if backend.startswith("compiled") and device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise BackendError(
                f"torch.compile needs a C++ compiler on a CPU, and {compiler} isn't here; install one, such "
                "as with apt-get install g++, or name it in CXX"
            )


def _is_there(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True
