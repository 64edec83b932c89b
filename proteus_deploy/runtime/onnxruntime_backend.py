"""ONNX Runtime backend: a bundle's graphs on the CPU or a CUDA provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.onnxruntime_session import (
    find_provider,
    missing_kernels,
    open_session,
    quantised_formats,
)
from proteus_deploy.runtime.backend import bind_sizes, refuse_custom_operators, resolve_dtype
from proteus_deploy.stages import Graph

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeGraph", "missing_kernels", "open_session", "quantised_formats"]


class OnnxRuntimeBackend:
    name = "onnxruntime"
    checks_ranges = True

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        """threads: intra-op threads; None leaves the choice to ONNX Runtime.

        Raises BackendError when the package or provider is absent, for a bf16 bundle on the CPU, or custom
        operators.
        """
        self.provider = find_provider(device)
        refuse_custom_operators(bundle, "ONNX Runtime")
        if bundle.dtype == "bf16":
            raise BackendError(
                "ONNX Runtime takes tensors from NumPy, which has no bfloat16, and its CPU provider has no "
                "bfloat16 kernels; run this bundle with openvino, or export it with --dtype fp32"
            )
        if missing := missing_kernels(bundle.manifest):
            raise BackendError(f"{missing}; run this bundle with openvino, or export another recipe")
        self.device = torch.device("cpu")  # ONNX Runtime moves tensors to its provider by itself
        self.dtype = resolve_dtype(bundle.dtype)
        self.table = bundle.table
        self._bundle = bundle
        self._threads = threads
        self._runners: dict[str, OnnxRuntimeGraph] = {}

    def runner(self, graph: str) -> OnnxRuntimeGraph:
        if graph not in self._runners:
            session = open_session(
                self._bundle.onnx_file(graph),
                self.provider,
                self._threads,
                formats=quantised_formats(self._bundle.manifest, graph),
            )
            self._runners[graph] = OnnxRuntimeGraph(self.table.graph(graph), session)
        return self._runners[graph]

    def release(self, graph: str) -> None:
        self._runners.pop(graph, None)

    def close(self) -> None:
        self._runners.clear()


class OnnxRuntimeGraph:
    def __init__(self, graph: Graph, session: Any) -> None:
        self.graph = graph
        self._session = session

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names or shapes break the contract."""
        bind_sizes(self.graph, inputs)
        feeds = {name: value.detach().contiguous().cpu().numpy() for name, value in inputs.items()}
        names = [spec.name for spec in self.graph.outputs]
        outputs = self._session.run(names, feeds)
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}
