"""OpenVINO backend: a bundle's graphs on Intel CPUs, also in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.runtime.backend import bind_sizes, refuse_custom_operators, resolve_dtype
from proteus_deploy.stages import AXIS_MEANING, Graph, StageTable, TensorSpec, axis_size, split_axis

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle

# T5 finds its relative position buckets with a logarithm; in bfloat16 it lands in neighbouring buckets.
_ALWAYS_FLOAT32 = ("text_encoder",)
_HINT = {"fp32": "f32", "fp16": "f32", "bf16": "bf16"}


def openvino_core() -> Any:
    """The one openvino.Core of this process. Raises BackendError when the package is absent."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise BackendError('openvino is not installed; pip install "proteus-deploy[openvino]"') from error
    return _the_core()


@cache
def _the_core() -> Any:
    """Made once and never let go.

    The first network compiled gives the calling thread a signal stack that belongs to the CPU plugin, which
    unmaps it when the last reference to the Core goes; if that happens in another thread, or with two Cores
    of which the older goes first, the next signal (Ctrl-C) writes into memory that is no longer its own.
    """
    import openvino

    return openvino.Core()


class OpenVinoBackend:
    name = "openvino"
    checks_ranges = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        denoiser_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """threads: that one call runs on; None leaves the choice to OpenVINO. denoiser_sizes: symbols of the
        denoiser's contract, such as {"B": 2, "f": 13, "y": 30, "x": 45, "L": 226}, that it is compiled for;
        it then takes these sizes only.

        Raises BackendError when the package or the device is absent, or a graph has custom operators, and
        InputError for a size out of range.
        """
        self._core = openvino_core()
        if device.upper() not in self._core.available_devices:
            raise BackendError(
                f"OpenVINO has no device {device!r}; it has {', '.join(self._core.available_devices)}"
            )
        refuse_custom_operators(bundle, "OpenVINO")
        self._device = device.upper()
        self.device = torch.device("cpu")
        self.dtype = resolve_dtype(bundle.dtype)
        self.table = bundle.table
        self._bundle = bundle
        self._threads = threads
        self._denoiser_sizes = dict(denoiser_sizes or {})
        if self._denoiser_sizes:
            _check_sizes(self.table, self._denoiser_sizes)
        self._runners: dict[str, OpenVinoGraph] = {}

    def runner(self, graph: str) -> OpenVinoGraph:
        if graph not in self._runners:
            contract = self.table.graph(graph)
            fixed = self._denoiser_sizes if graph == "denoiser" else {}
            file = self._bundle.onnx_file(graph)
            try:
                model = self._core.read_model(str(file))
                if fixed:
                    model.reshape({spec.name: _partial_shape(spec, fixed) for spec in contract.inputs})
                compiled = self._core.compile_model(model, self._device, self._settings(graph))
            except RuntimeError as error:
                raise BackendError(f"OpenVINO can't compile {file}: {error}") from error
            self._runners[graph] = OpenVinoGraph(contract, compiled, fixed)
        return self._runners[graph]

    def _settings(self, graph: str) -> dict[str, Any]:
        """What decides results is set; nothing else was measured to gain (docs/openvino.md)."""
        hint = "f32" if graph in _ALWAYS_FLOAT32 else _HINT[self._bundle.dtype]
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            # By default activations beside low-bit weights become int8; precision is the graph's business.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        return settings

    def release(self, graph: str) -> None:
        self._runners.pop(graph, None)

    def close(self) -> None:
        self._runners.clear()


def _check_sizes(table: StageTable, sizes: Mapping[str, int]) -> None:
    known = table.graph("denoiser").symbols
    if unknown := sorted(set(sizes) - set(known)):
        raise InputError(f"denoiser_sizes has {unknown[0]!r}; the denoiser's symbols are {', '.join(known)}")
    table.check(sizes)


def _partial_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    """The input's shape with -1 for what stays dynamic."""
    return [
        axis_size(axis, sizes) if isinstance(axis, int) or split_axis(axis)[1] in sizes else -1
        for axis in spec.axes
    ]


class OpenVinoGraph:
    def __init__(self, graph: Graph, compiled: Any, fixed: Mapping[str, int] | None = None) -> None:
        """fixed: the only values that these symbols may have."""
        self.graph = graph
        self._fixed = dict(fixed or {})
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._lock = Lock()  # a request holds one run's results until they are copied out

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Raises InputError when names or shapes break the contract, or a size isn't the fixed one."""
        sizes = bind_sizes(self.graph, inputs)
        for symbol, size in self._fixed.items():
            if sizes[symbol] != size:
                raise InputError(
                    f"{self.graph.name}: {AXIS_MEANING.get(symbol, symbol)} ({symbol}) is {sizes[symbol]}, "
                    f"and denoiser_sizes fixed it at {size}; open another backend for it, or one without "
                    "denoiser_sizes"
                )
        feeds = {name: tensor_to_openvino(value) for name, value in inputs.items()}
        with self._lock:
            self._request.infer(feeds, share_inputs=False)
            return {
                spec.name: tensor_from_openvino(self._request.get_tensor(spec.name))
                for spec in self.graph.outputs
            }


def tensor_to_openvino(value: Tensor) -> Any:
    """A copy as openvino.Tensor, fp32, fp16, bf16 or int64."""
    import openvino

    value = value.detach().contiguous().cpu()
    if value.dtype == torch.bfloat16:  # NumPy has no bfloat16: the bits travel as int16
        return openvino.Tensor(value.view(torch.int16).numpy(), value.shape, openvino.Type.bf16)
    return openvino.Tensor(value.numpy())


def tensor_from_openvino(value: Any) -> Tensor:
    """A copy: OpenVINO writes the next result into the same memory."""
    import openvino

    if value.element_type == openvino.Type.bf16:  # shown as float16 by NumPy, with bfloat16's bits
        return torch.from_numpy(value.data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(value.data.copy())
