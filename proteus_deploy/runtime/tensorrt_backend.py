"""TensorRT backend: a bundle's engines on torch CUDA tensors, by the names of their inputs and outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.onnx_weights import OnnxWeights
from proteus_deploy.runtime.backend import bind_sizes, resolve_dtype
from proteus_deploy.runtime.tensorrt_api import TensorRT, current_gpu
from proteus_deploy.runtime.tensorrt_refit import EngineRefitter
from proteus_deploy.stages import Graph

if TYPE_CHECKING:
    from proteus_deploy.bundle import Bundle, EngineSet
    from proteus_deploy.weights import WeightSource

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class TensorRTBackend:
    """The engines that were built for the GPU of `device`."""

    name = "tensorrt"
    checks_ranges = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cuda",
        runtime_cache: Path | None = None,
        weight_budget: int | None = None,
    ) -> None:
        """Raises BackendError without a CUDA device, BundleError without engines for it.

        runtime_cache: folder for kernels compiled on this GPU (tensorrt_rtx only), one file per graph.
        weight_budget: bytes of each engine's weights to keep on the GPU, for engines that were built with
        weight streaming; None leaves the choice to TensorRT.
        """
        self.device = torch.device(device)
        built = [target for target in bundle.targets if not target.startswith("aotinductor")]
        gpu = _require_gpu(self.device, " and ".join(built) or "no target yet")
        self.dtype = resolve_dtype(bundle.dtype)
        self.table = bundle.table
        self.engines = bundle.engines(gpu)
        self._runtime_cache = runtime_cache
        self._weight_budget = weight_budget
        self._runners: dict[str, TensorRTGraph] = {}
        self._bundle = bundle
        takes_adapters = any(
            spec.name == "adapter_down" for graph in self.table.graphs for spec in graph.inputs
        )
        # Adapters come as other weights where the graph has no inputs for them.
        self.refits = bool(self.engines.document.get("options", {}).get("refit")) and not takes_adapters

    def runner(self, graph: str) -> TensorRTGraph:
        if graph not in self._runners:
            file = None if self._runtime_cache is None else self._runtime_cache / f"{graph}.cache"
            self._runners[graph] = TensorRTGraph.open(
                self.engines,
                self.table.graph(graph),
                device=self.device,
                runtime_cache=file,
                weight_budget=self._weight_budget,
            )
        return self._runners[graph]

    def refit(self, graph: str, key: Hashable, deltas: Callable[[], Mapping[str, torch.Tensor]]) -> float:
        """See `runtime.backend.RefitBackend`. Raises BackendError where the engine refuses."""
        file = self._bundle.onnx_file(graph)
        return self.runner(graph).refit(key, deltas, partial(OnnxWeights, file))

    def release(self, graph: str) -> None:
        if (runner := self._runners.pop(graph, None)) is not None:
            runner.close()

    def close(self) -> None:
        for graph in tuple(self._runners):
            self.release(graph)


def _require_gpu(device: torch.device, targets: str) -> str:
    if device.type != "cuda":
        raise BackendError(f"TensorRT engines run on a CUDA device, not on {str(device)!r}")
    gpu = current_gpu(device.index or 0)
    if gpu is None:
        raise BackendError(f"engines for {targets} are built, not run: no CUDA device here")
    return gpu


def set_weight_budget(engine: Any, graph: str, budget: int | None, *, streams: bool) -> None:
    """Say how many bytes of weights stay on the GPU; has to come before the execution context.

    streams: whether the engine was built with weight streaming. budget: None leaves it to TensorRT; more
    than all weights means all of them. Raises InputError for a budget that the engine can't follow.
    """
    if not streams:
        if budget is not None:
            raise InputError(
                f"{graph}: a weight budget of {budget} bytes is for engines built with --weight-streaming; "
                "build it so, or leave the budget out"
            )
        return
    if budget is not None and budget < 0:
        raise InputError(f"{graph}: a weight budget of {budget} bytes is below 0; give bytes, or None")
    whole = int(engine.streamable_weights_size)
    wanted = engine.get_weight_streaming_automatic_budget() if budget is None else min(budget, whole)
    engine.weight_streaming_budget_v2 = wanted
    if engine.weight_streaming_budget_v2 != wanted:
        raise BackendError(f"{graph}: TensorRT refused a weight budget of {wanted} of {whole} bytes")


class TensorRTGraph:
    """A loaded engine. Outputs are new tensors, written on the device's current stream like torch's own."""

    def __init__(
        self,
        graph: Graph,
        engine: Any,
        contract: Mapping[str, Any],
        *,
        device: torch.device | str = "cuda",
        runtime_cache: Path | None = None,
        api: TensorRT | None = None,
    ) -> None:
        """engine: an ICudaEngine on `device`; contract: what its record says, written at build time. api: the
        package it came from, needed for `refit` alone.

        Raises BackendError when the two differ, or the GPU's memory is too small.
        """
        self.graph = graph
        self.device = torch.device(device)
        tensors = (*contract["inputs"], *contract["outputs"])
        self._dtypes = {tensor["name"]: TORCH_DTYPES[tensor["dtype"]] for tensor in tensors}
        self._profile = contract["profile"]
        self._lock = threading.Lock()  # a context runs one call at a time
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if found != self._dtypes.keys():
            raise BackendError(
                f"{graph.name}: the engine has the tensors {', '.join(sorted(found))}, its record "
                f"{', '.join(sorted(self._dtypes))}; build it again"
            )
        self._engine = engine
        self._api = api
        self._refitter: EngineRefitter | None = None
        self._runtime_cache_file = runtime_cache
        self._runtime_cache: Any = None
        self._context = self._new_context(engine)
        if self._context is None:
            raise BackendError(f"{graph.name}: no execution context; the GPU's memory is probably too small")

    @classmethod
    def open(
        cls,
        engines: EngineSet,
        graph: Graph,
        *,
        device: torch.device | str = "cuda",
        runtime_cache: Path | None = None,
        weight_budget: int | None = None,
    ) -> TensorRTGraph:
        """Load an engine. Raises BackendError where it can't run: no GPU, another GPU, another version.

        weight_budget: see TensorRTBackend. Raises InputError for an engine that doesn't stream its weights.
        """
        target, flavour, version = (engines.document[field] for field in ("target", "flavour", "version"))
        gpu = _require_gpu(torch.device(device), target)
        if gpu != target:
            raise BackendError(f"engines for {target} don't run on this {gpu}; build with --target {gpu}")
        api = TensorRT.load(flavour)
        if api.version != version:
            raise BackendError(
                f"{engines.folder} was built with {flavour} {version}, installed is {api.version}; "
                f"build it again or install that version"
            )
        with torch.cuda.device(device):
            engine = api.deserialize(engines.file(graph.name))
            streams = bool(engines.document.get("options", {}).get("weight_streaming"))
            set_weight_budget(engine, graph.name, weight_budget, streams=streams)
            contract = engines.graphs[graph.name]["contract"]
            return cls(graph, engine, contract, device=device, runtime_cache=runtime_cache, api=api)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name. Raises InputError when names, shapes, ranges, dtypes or devices don't fit."""
        context = self._context
        if context is None:
            raise BackendError(f"{self.graph.name}: the engine was closed")
        kept = self._check(inputs)
        with self._lock, self._current_device():
            for name, tensor in kept.items():
                if not context.set_input_shape(name, tuple(tensor.shape)):
                    raise BackendError(
                        f"{self.graph.name}: shape {list(tensor.shape)} of {name!r} is refused"
                    )
                self._bind(name, tensor)
            if missing := context.infer_shapes():
                raise BackendError(
                    f"{self.graph.name}: shapes depend on {', '.join(missing)}, which has none"
                )
            outputs = {}
            for spec in self.graph.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                outputs[spec.name] = torch.empty(shape, dtype=self._dtypes[spec.name], device=self.device)
                self._bind(spec.name, outputs[spec.name])
            if not context.execute_async_v3(self._stream()):
                raise BackendError(f"{self.graph.name}: the engine failed on {self.device}")
        return outputs

    def refit(
        self,
        key: Hashable,
        deltas: Callable[[], Mapping[str, torch.Tensor]],
        weights: Callable[[Container[str]], WeightSource],
    ) -> float:
        """As `EngineRefitter.set`, between two calls. weights: source of the exported values of names."""
        if self._api is None or self._engine is None:
            raise BackendError(f"{self.graph.name}: the engine was closed, or opened without its package")
        with self._lock, self._current_device():
            if self._refitter is None:
                self._refitter = EngineRefitter(self._api, self._engine, self.graph.name, weights)
            self._synchronize()
            return self._refitter.set(key, deltas)

    def close(self) -> None:
        """Free the engine; write the kernels compiled so far when a runtime cache was asked for."""
        if self._context is None:
            return
        if self._runtime_cache is not None and self._runtime_cache_file is not None:
            with atomic_file(self._runtime_cache_file) as temporary:
                temporary.write_bytes(memoryview(self._runtime_cache.serialize()))
        self._context = self._runtime_cache = self._refitter = self._engine = None

    def _new_context(self, engine: Any) -> Any:
        if self._runtime_cache_file is None:
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            raise InputError(f"{self.graph.name}: only tensorrt_rtx keeps a runtime cache; leave it out")
        self._runtime_cache = config.create_runtime_cache()
        if self._runtime_cache_file.is_file():
            # Kernels of another GPU or version are ignored, and replaced when the file is written.
            self._runtime_cache.deserialize(self._runtime_cache_file.read_bytes())
        config.set_runtime_cache(self._runtime_cache)
        return engine.create_execution_context(config)

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs, contiguous. The engine gets bare addresses, so nothing after this would notice."""
        bind_sizes(self.graph, inputs)
        for name, tensor in inputs.items():
            where = f"{self.graph.name}: input {name!r}"
            if tensor.dtype != self._dtypes[name] or tensor.device.type != self.device.type:
                wanted = f"{self._dtypes[name]} on {self.device}"
                raise InputError(f"{where} is {tensor.dtype} on {tensor.device}; the engine takes {wanted}")
            low, high = self._profile[name]["min"], self._profile[name]["max"]
            shape = list(tensor.shape)
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                raise InputError(f"{where} has shape {shape}; the engine takes {low} to {high}")
        return {name: tensor.contiguous() for name, tensor in inputs.items()}

    def _bind(self, name: str, tensor: torch.Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise BackendError(f"{self.graph.name}: the address of {name!r} is refused")

    def _current_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _synchronize(self) -> None:
        """Wait for calls that were launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream
