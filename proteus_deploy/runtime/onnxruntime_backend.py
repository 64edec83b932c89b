"""ONNX Runtime backend: a bundle's graphs on the CPU or a CUDA provider."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import BackendError
from proteus_deploy.runtime.backend import bind_sizes, refuse_custom_operators, resolve_dtype
from proteus_deploy.stages import Graph

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    name = "onnxruntime"
    checks_ranges = True

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        """threads: intra-op threads; None leaves the choice to ONNX Runtime.

        Raises BackendError when the package or provider is absent, for a bf16 bundle on the CPU, or custom
        operators.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError('onnxruntime is not installed; pip install "proteus-deploy[onnx]"') from error
        name = str(device).removesuffix(":0")
        if name not in _PROVIDERS:
            raise BackendError(f"ONNX Runtime device is {device!r}; choose from {', '.join(_PROVIDERS)}")
        self.provider = _PROVIDERS[name]
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise BackendError(f"ONNX Runtime has no {self.provider} here; it has {', '.join(available)}")
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


def quantised_formats(manifest: Mapping[str, Any], graph: str) -> tuple[str, ...]:
    """Formats of the graph's codes, as the manifest of its bundle says; none where it isn't quantised."""
    return tuple(manifest["graphs"][graph].get("quantization", {}).get("formats", ()))


def missing_kernels(manifest: Mapping[str, Any]) -> str:
    """Why ONNX Runtime can't run a quantised bundle; empty where it can."""
    graphs = [graph for graph in manifest["graphs"] if "nvfp4" in quantised_formats(manifest, graph)]
    if not graphs:
        return ""
    return f"ONNX Runtime has no kernel for the nvfp4 weights of {', '.join(graphs)}"


def open_session(
    file: Any,
    provider: str = "CPUExecutionProvider",
    threads: int | None = None,
    *,
    formats: Collection[str] = (),
) -> Any:
    """An InferenceSession over an ONNX file. formats: of the graph's codes ("int8", "fp8_e4m3", "int4").

    Raises BackendError with ONNX Runtime's reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if formats:
        # By default activations beside low-bit weights become int8; precision is the graph's business.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Without VNNI or AMX, sums of two int8 products overflow 16 bits and are cut; with it they don't.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if "fp8_e4m3" in formats:
        # Further levels move QuantizeLinear through operators that have no E4M3 form: the graph is refused.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises its own types, which have no common public base
        raise BackendError(f"ONNX Runtime can't load {file}: {error}") from error
    # A provider whose libraries don't load is replaced by the CPU with no more than a warning.
    if (found := session.get_providers()[0]) != provider:
        raise BackendError(f"ONNX Runtime could not start {provider} for {file} and offered {found}")
    return session


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
