"""ONNX Runtime sessions over exported graphs, without torch, for a process that only runs one graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from proteus_deploy.errors import BackendError

__all__ = [
    "PROVIDERS",
    "device_name",
    "find_provider",
    "missing_kernels",
    "open_session",
    "quantised_formats",
    "session_options",
]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def device_name(device: str) -> str:
    """What ONNX Runtime is asked for: it is given the first device of a kind, "cuda:0" as "cuda"."""
    return str(device).removesuffix(":0")


def find_provider(device: str) -> str:
    """The provider of a device: cpu or cuda, of which ONNX Runtime is given the first.

    Raises BackendError for another device, and where the package or its provider is absent.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError('onnxruntime is not installed; pip install "proteus-deploy[onnx]"') from error
    name = device_name(device)
    if name not in PROVIDERS:
        raise BackendError(f"ONNX Runtime device is {device!r}; choose from {', '.join(PROVIDERS)}")
    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        raise BackendError(f"ONNX Runtime has no {PROVIDERS[name]} here; it has {', '.join(available)}")
    return PROVIDERS[name]


def quantised_formats(manifest: Mapping[str, Any], graph: str) -> tuple[str, ...]:
    """Formats of the graph's codes, as the manifest of its bundle says; none where it isn't quantised."""
    return tuple(manifest["graphs"][graph].get("quantization", {}).get("formats", ()))


def missing_kernels(manifest: Mapping[str, Any]) -> str:
    """Why ONNX Runtime can't run a quantised bundle; empty where it can."""
    graphs = [graph for graph in manifest["graphs"] if "nvfp4" in quantised_formats(manifest, graph)]
    if not graphs:
        return ""
    return f"ONNX Runtime has no kernel for the nvfp4 weights of {', '.join(graphs)}"


def session_options() -> Any:
    """Options of the sessions of models: errors only in its log, and threads that rest between its runs.

    Each session has threads of its own, which by default go on spinning after a run. On a CPU whose cores are
    all in use they take them from the next session, and from PyTorch.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


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

    options = session_options()
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
