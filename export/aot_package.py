"""Every graph of a bundle to AOTInductor packages: machine code for this kind of CPU, weights beside it.

    engines/aotinductor-cpu/<graph>.pt2            torch.export's graph, compiled; no weights
    engines/aotinductor-cpu/<graph>.safetensors    the weights under their names in the network

The packages take the table's dynamic axes. They are compiled from the checkpoint's networks, not from the
bundle's ONNX, so the checkpoint must be the one that the bundle was exported from.
"""

from __future__ import annotations

import io
import logging
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from proteus_deploy._files import atomic_file
from proteus_deploy.bundle import Bundle, EngineSet
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.build import OnGraph, select_graphs, write_engines
from proteus_deploy.export.onnx_graph import dynamic_shapes, group_variadic, trace_sizes
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.aotinductor_backend import FLAVOUR, TARGET, load_package, torch_version
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.runtime.cpu_instructions import InstructionSet, instruction_set
from proteus_deploy.stages import Graph, StageTable, sample_inputs

if TYPE_CHECKING:
    from proteus_deploy.checkpoint import Checkpoint

__all__ = ["TARGET", "build_packages"]


def build_packages(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    stages: Sequence[str] | None = None,
    progress: OnGraph | None = None,
    cancel: Event | None = None,
) -> EngineSet:
    """Compile packages into `bundle.folder/engines/aotinductor-cpu/` and return them.

    stages: only these; packages of other stages stay when the same export, PyTorch and instruction set made
    them. progress, cancel: as in `build_bundle`; cancel is looked at between graphs.
    Raises InputError for another checkpoint than the bundle's, BackendError without a C++ compiler; then, and
    when the process is killed, nothing is changed.
    """
    if checkpoint.hash != bundle.manifest["checkpoint"].get("hash"):
        raise InputError(
            f"{checkpoint.folder} is not the checkpoint that {bundle.folder} was exported from "
            "(hashes differ)"
        )
    if "controlnet" in bundle.table.stages:
        raise InputError(
            f"{bundle.folder} has a control network, which AOTInductor packages don't hold yet; export one "
            "without --controlnet for them, or run this one with onnxruntime, openvino or tensorrt"
        )
    target = _target_cpu()
    settings = _settings(target)
    factory = NetworkFactory(checkpoint, folded=True)
    dtype = resolve_dtype(bundle.dtype)

    def build(graph: Graph, folder: Path) -> dict[str, Any]:
        started_s = time.monotonic()
        module = factory(graph.name).materialise(dtype)
        return {**_package(graph, bundle.table, module, dtype, settings, folder), **_spent(started_s)}

    document = {
        "target": TARGET,
        "flavour": FLAVOUR,
        "version": torch_version(),
        "options": settings,
        "cpu": {
            "machine": platform.machine(),
            "instruction_set": target.name,
            "needs": list(target.needs),
        },
    }
    graphs = select_graphs(bundle, stages)
    return write_engines(
        bundle, document, graphs, build, keep_others=stages is not None, progress=progress, cancel=cancel
    )


def _target_cpu() -> InstructionSet:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise BackendError(
            "compiling packages needs a C++ compiler, and none was found; install g++ or clang++, or name "
            "one in the environment variable CXX"
        ) from error
    return instruction_set(pick_vec_isa(), torch.cpu.get_capabilities())


def _settings(target: InstructionSet) -> dict[str, Any]:
    """Settings of inductor, as they are kept in the manifest."""
    return {
        # A number of threads would be written into the code: that of the machine which compiles.
        "cpp.dynamic_threads": True,
        "cpp.march": target.march,
        # In the library, weights would be unpacked into a temporary folder at every load.
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
    }


def _package(
    graph: Graph,
    table: StageTable,
    module: nn.Module,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write `<graph>.pt2` and `<graph>.safetensors`; the graph's record."""
    from safetensors.torch import save_file
    from torch._inductor import aoti_compile_and_package

    package, weights = folder / f"{graph.name}.pt2", folder / f"{graph.name}.safetensors"
    with _quiet(), torch.no_grad():
        program = _export(graph, table, module, dtype)
        archive = io.BytesIO()
        aoti_compile_and_package(program, package_path=archive, inductor_configs=dict(settings))
    with atomic_file(package) as temporary:
        temporary.write_bytes(archive.getbuffer())
    model, _ = load_package(package, None)
    held = {**program.state_dict, **program.constants}
    with atomic_file(weights) as temporary:
        save_file(_apart({name: held[name] for name in sorted(model.get_constant_fqns())}), temporary)
    return {
        "file": package.name,
        "weights": weights.name,
        "bytes": package.stat().st_size + weights.stat().st_size,
        "status": "loaded, not run",
        "cached": False,
    }


def _export(
    graph: Graph, table: StageTable, module: nn.Module, dtype: torch.dtype
) -> torch.export.ExportedProgram:
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    samples = sample_inputs(graph, trace_sizes(graph, table))
    examples = tuple(samples[spec.name].to(kinds[spec.dtype]) for spec in graph.inputs)
    shapes = group_variadic(module, dynamic_shapes(graph, table))
    return torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none in the memory of another: safetensors refuses tied weights (T5's embedding)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return found


def _spent(started_s: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - started_s, 3)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns about PyTorch's own use of what it is going to remove."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
