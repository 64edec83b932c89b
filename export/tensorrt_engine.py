"""One ONNX graph to one TensorRT engine, with a record of what it takes, gives and cost."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

from proteus_deploy._files import atomic_file, write_json
from proteus_deploy.errors import BackendError, BundleError
from proteus_deploy.export import host_memory
from proteus_deploy.export.engine_cache import EngineCache, cache_key
from proteus_deploy.export.engine_contract import check_contract, check_precisions, read_contract
from proteus_deploy.export.engine_inspector import InspectedEngine
from proteus_deploy.export.engine_layers import read_layers
from proteus_deploy.export.engine_report import add_inspection, report_network
from proteus_deploy.export.engine_source import EngineSource
from proteus_deploy.runtime.tensorrt_api import EngineOptions, TensorRT, current_gpu
from proteus_deploy.stages import Graph, StageTable

BUILT = "built, not run"
LOADED = "loaded, not run"  # on a GPU of the target: it deserialises there, and its layers are listed
_LAYERS = ".layers.json"


def build_engine(
    onnx_file: Path,
    graph: Graph,
    table: StageTable,
    target: str,
    *,
    api: TensorRT,
    destination: Path,
    dtype: str,
    options: EngineOptions | None = None,
    cache: EngineCache | None = None,
    force_memory: bool = False,
    cancel: Event | None = None,
) -> dict[str, Any]:
    """Build the engine of `graph` for `target`, write it to `destination`, and return its record.

    dtype: precision of the stage table's "float" tensors: fp32, fp16 or bf16.
    force_memory: build even when the prediction says that host memory will not do.
    cancel: ends the build at TensorRT's next step with Cancelled.

    The record: file, bytes, status, cached, seconds, contract, memory {predicted_bytes, peak_bytes}, report
    (see engine_report.py). Raises InputError for a target, option or memory that will not do,
    BundleError for an ONNX file that isn't what the stage table says, BackendError when TensorRT fails.
    """
    options = options or EngineOptions()
    target = api.resolve_target(target)
    api.check_options(options)
    started_s = time.monotonic()
    source = EngineSource.read(onnx_file)
    plugins = _add_plugins(source, api, target)
    key, record = "", None
    if cache is not None:
        key = _key(source, graph, table, target, api, options, dtype, plugins)
        record = cache.fetch(key, destination)
    cached = record is not None
    if record is None:
        record = _build(
            source, graph, table, target, api, destination, dtype, options, cache, force_memory, cancel
        )
        if cache is not None:
            cache.store(key, destination, record)
    status = _status(api, target, destination)
    if status == LOADED:
        inspected = InspectedEngine.read(destination.with_suffix(_LAYERS))
        record = {**record, "report": add_inspection(record["report"], inspected)}
    return {
        **record,
        "file": destination.name,
        "bytes": destination.stat().st_size,
        "cached": cached,
        "status": status,
        "seconds": round(time.monotonic() - started_s, 3),
    }


def _key(
    source: EngineSource,
    graph: Graph,
    table: StageTable,
    target: str,
    api: TensorRT,
    options: EngineOptions,
    dtype: str,
    plugins: dict[str, Any],
) -> str:
    return cache_key(
        {
            "onnx": source.digest(),
            "graph": asdict(graph),
            "profile": table.profile(graph),
            "dtype": dtype,
            "target": target,
            "flavour": api.flavour,
            "version": api.version,
            "options": options.to_json(),
            **plugins,
        }
    )


def _add_plugins(source: EngineSource, api: TensorRT, target: str) -> dict[str, Any]:
    """Register what the graph's custom operators need; what that adds to the key of a cached engine."""
    from proteus_deploy.export.identity_onnx import OPERATOR_ID

    if unknown := [name for name in source.custom_operators if name != OPERATOR_ID]:
        raise BundleError(f"{source.onnx_file} has the operators {', '.join(unknown)}, which no plugin runs")
    if not source.custom_operators:
        return {}
    from proteus_deploy.export.identity_plugin import plugin_key, register_identity_plugin

    register_identity_plugin(api, target)
    return {"plugin": plugin_key()}


def _build(
    source: EngineSource,
    graph: Graph,
    table: StageTable,
    target: str,
    api: TensorRT,
    destination: Path,
    dtype: str,
    options: EngineOptions,
    cache: EngineCache | None,
    force_memory: bool,
    cancel: Event | None,
) -> dict[str, Any]:
    gc.collect()  # networks of earlier graphs hold their weights
    builder, network = api.new_network()
    predicted = host_memory.predict_bytes(source.weight_bytes, source.nodes, streamed=api.can_stream(builder))
    if not force_memory:
        host_memory.check(f"{graph.name} for {target}", predicted, host_memory.available())
    with host_memory.PeakMemory() as memory:
        parser = api.parse(network, source.onnx_file)
        contract = read_contract(network, graph, table)
        check_contract(contract, graph, table, dtype)
        check_precisions(contract, target)
        config = api.new_config(builder, target, options)
        _add_profile(builder, config, network, graph, table)
        timing_file = None if cache is None else cache.timing_file(api.version, target)
        _load_timings(api, config, timing_file)
        try:
            with atomic_file(destination) as temporary:
                api.write_engine(builder, network, config, temporary, cancel=cancel)
        except BackendError as error:
            raise BackendError(f"graph {graph.name!r} for {target}: {error}") from error
        _store_timings(api, config, timing_file)
        # After the build, which must see the network as it was parsed.
        shapes = {name: sizes["opt"] for name, sizes in table.profile(graph).items()}
        report = report_network(read_layers(network, api.module, shapes), dtype)
        del parser, network, config, builder  # in this order: each uses the next
    return {
        "contract": contract,
        "memory": {"predicted_bytes": predicted, "peak_bytes": memory.peak_bytes},
        "report": report,
    }


def _add_profile(builder: Any, config: Any, network: Any, graph: Graph, table: StageTable) -> None:
    """One optimisation profile over all the inputs with a dynamic axis."""
    shapes = table.profile(graph)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name in dynamic:
        profile.set_shape(name, *(shapes[name][which] for which in ("min", "opt", "max")))
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(f"graph {graph.name!r}: TensorRT refuses the optimisation profile {shapes}")


def _load_timings(api: TensorRT, config: Any, file: Path | None) -> None:
    """Give the builder the kernel timings of earlier builds; RTX has none: it compiles on the GPU."""
    if file is None or api.can_build_ahead:
        return
    content = file.read_bytes() if file.is_file() else b""
    timings = config.create_timing_cache(content) or config.create_timing_cache(b"")
    config.set_timing_cache(timings, ignore_mismatch=False)


def _store_timings(api: TensorRT, config: Any, file: Path | None) -> None:
    if file is None or api.can_build_ahead:
        return
    with atomic_file(file) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _status(api: TensorRT, target: str, file: Path) -> str:
    """Load the engine where its GPU is present, and list its layers in `<graph>.layers.json` beside it."""
    if current_gpu() != target:
        return BUILT
    engine = api.deserialize(file)
    inspector = engine.create_engine_inspector()
    report = inspector.get_engine_information(api.module.LayerInformationFormat.JSON)
    write_json(file.with_suffix(_LAYERS), json.loads(report))
    return LOADED
