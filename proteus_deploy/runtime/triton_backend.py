"""Triton backend: inside NVIDIA Triton Inference Server, the networks are other models of the server.

Only Triton's Python backend has the module that calls them, so a pipeline on this backend runs there and
nowhere else. Tensors travel through host memory and DLPack, which has bfloat16 where NumPy has not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from proteus_deploy.errors import BackendError
from proteus_deploy.runtime.backend import bind_sizes, resolve_dtype
from proteus_deploy.stages import Graph

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle

__all__ = ["TritonBackend", "TritonGraph", "load_utilities"]

_UTILITIES = "triton_python_backend_utils"


def load_utilities() -> Any:
    """The module of Triton's Python backend. Raises BackendError outside of the server."""
    try:
        return importlib.import_module(_UTILITIES)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{_UTILITIES} is not here: the backend triton runs inside Triton Inference Server; make a "
            "repository for it with: proteus-deploy export BUNDLE --triton DIR"
        ) from error


class TritonBackend:
    """The models `<prefix>_<graph>` of the server that this process belongs to.

    Their memory is the server's: `release` and `close` leave it alone.
    """

    name = "triton"
    checks_ranges = True

    def __init__(self, bundle: Bundle, prefix: str) -> None:
        """Raises BackendError outside of the server."""
        self.table = bundle.table
        self.dtype = resolve_dtype(bundle.dtype)
        self.device = torch.device("cpu")
        self._prefix = prefix
        self._utilities = load_utilities()

    def runner(self, graph: str) -> TritonGraph:
        return TritonGraph(self.table.graph(graph), f"{self._prefix}_{graph}", self._utilities)

    def release(self, graph: str) -> None:
        pass

    def close(self) -> None:
        pass


class TritonGraph:
    def __init__(self, graph: Graph, model: str, utilities: Any) -> None:
        """utilities: the module of Triton's Python backend."""
        self.graph = graph
        self.model = model
        self._utilities = utilities

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names or shapes break the contract, BackendError when the model fails."""
        bind_sizes(self.graph, inputs)
        utilities = self._utilities
        request = utilities.InferenceRequest(
            model_name=self.model,
            requested_output_names=[spec.name for spec in self.graph.outputs],
            inputs=[
                utilities.Tensor.from_dlpack(spec.name, inputs[spec.name].detach().contiguous())
                for spec in self.graph.inputs
            ],
            preferred_memory=utilities.PreferredMemory(utilities.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(f"Triton's model {self.model!r} failed: {response.error().message()}")
        found = {tensor.name(): tensor for tensor in response.output_tensors()}
        # Copied, so that the block of shared memory goes back to the server with the response.
        return {spec.name: from_dlpack(found[spec.name].to_dlpack()).clone() for spec in self.graph.outputs}
