"""Backends: one small file each. `open_backend` chooses by name; nothing falls back to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_deploy.errors import BackendError

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.runtime.backend import Backend

BUNDLE_BACKENDS = ("onnxruntime", "openvino", "tensorrt", "aotinductor")
CHECKPOINT_BACKENDS = ("eager", "compiled")


def open_bundle_backend(bundle: Bundle, name: str, *, device: str | None = None) -> Backend:
    """The named backend on a bundle. Raises BackendError listing the names when it isn't one."""
    if name == "onnxruntime":
        from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, device=device or "cpu")
    if name == "openvino":
        from proteus_deploy.runtime.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, device=device or "cpu")
    if name == "tensorrt":
        from proteus_deploy.runtime.tensorrt_backend import TensorRTBackend

        return TensorRTBackend(bundle, device=device or "cuda")
    if name == "aotinductor":
        from proteus_deploy.runtime.aotinductor_backend import AotInductorBackend

        return AotInductorBackend(bundle, device=device or "cpu")
    if name in CHECKPOINT_BACKENDS:
        raise BackendError(f"backend {name!r} runs a checkpoint, not a bundle; pass the checkpoint folder")
    raise BackendError(f"backend {name!r} is unknown; a bundle runs with {', '.join(BUNDLE_BACKENDS)}")
