"""OpenVINO backend: a bundle's graphs on Intel CPUs, also in bfloat16."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.runtime.backend import bind_sizes, resolve_dtype
from proteus_deploy.stages import Graph

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle

# T5 finds its relative position buckets with a logarithm; in bfloat16 it lands in neighbouring buckets.
_ALWAYS_FLOAT32 = ("text_encoder",)
_HINT = {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}


class OpenVinoBackend:
    name = "openvino"
    checks_ranges = True

    def __init__(self, bundle: Bundle, *, device: str = "cpu") -> None:
        """Raises BackendError when the package or the device is absent."""
        try:
            import openvino
        except ImportError as error:
            raise BackendError('openvino is not installed; pip install "proteus-deploy[openvino]"') from error
        self._core = openvino.Core()
        if device.upper() not in self._core.available_devices:
            raise BackendError(
                f"OpenVINO has no device {device!r}; it has {', '.join(self._core.available_devices)}"
            )
        self._device = device.upper()
        self.device = torch.device("cpu")
        self.dtype = resolve_dtype(bundle.dtype)
        self.table = bundle.table
        self._bundle = bundle
        self._runners: dict[str, OpenVinoGraph] = {}

    def runner(self, graph: str) -> OpenVinoGraph:
        if graph not in self._runners:
            hint = "f32" if graph in _ALWAYS_FLOAT32 else _HINT[self._bundle.dtype]
            settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
            file = self._bundle.onnx_file(graph)
            try:
                compiled = self._core.compile_model(str(file), self._device, settings)
            except RuntimeError as error:
                raise BackendError(f"OpenVINO can't compile {file}: {error}") from error
            self._runners[graph] = OpenVinoGraph(self.table.graph(graph), compiled)
        return self._runners[graph]

    def release(self, graph: str) -> None:
        self._runners.pop(graph, None)

    def close(self) -> None:
        self._runners.clear()


class OpenVinoGraph:
    def __init__(self, graph: Graph, compiled: Any) -> None:
        self.graph = graph
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._lock = Lock()  # a request holds one run's results until they are copied out

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names or shapes break the contract."""
        bind_sizes(self.graph, inputs)
        feeds = {name: _to_openvino(value) for name, value in inputs.items()}
        with self._lock:
            self._request.infer(feeds, share_inputs=False)
            return {spec.name: _to_torch(self._request.get_tensor(spec.name)) for spec in self.graph.outputs}


def _to_openvino(value: Tensor) -> Any:
    import openvino

    value = value.detach().contiguous().cpu()
    if value.dtype == torch.bfloat16:  # NumPy has no bfloat16: the bits travel as int16
        return openvino.Tensor(value.view(torch.int16).numpy(), value.shape, openvino.Type.bf16)
    return openvino.Tensor(value.numpy())


def _to_torch(value: Any) -> Tensor:
    """A copy: OpenVINO writes the next result into the same memory."""
    import openvino

    if value.element_type == openvino.Type.bf16:  # shown as float16 by NumPy, with bfloat16's bits
        return torch.from_numpy(value.data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(value.data.copy())
