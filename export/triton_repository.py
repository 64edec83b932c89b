"""Bundle -> model repository of NVIDIA Triton Inference Server.

    NAME/config.pbtxt  NAME/1/model.py  NAME/1/bundle/      the loop, and what the pipeline reads
    NAME_<graph>/config.pbtxt  NAME_<graph>/1/…             one model per graph of the stage table

The loop is `serving.triton_loop` on a `runtime.triton_backend`: the library's own pipeline, whose networks
are the other models. A repository needs the bundle no more once it is written.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from proteus_deploy._files import atomic_directory
from proteus_deploy.bundle import Bundle, EngineSet
from proteus_deploy.errors import BackendError, BundleError, InputError
from proteus_deploy.export.triton_config import Backend, Kind, ModelConfig, stage_tensors, video_config
from proteus_deploy.onnxruntime_session import missing_kernels, quantised_formats
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.runtime.backend import refuse_custom_operators
from proteus_deploy.stages import Graph

__all__ = ["check_repository", "write_repository"]

Placing = Literal["copy", "link"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_KINDS: dict[str, Kind] = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}
_MODEL = '''"""{what}; written by `proteus-deploy export --triton`."""

from proteus_deploy.serving.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def check_repository(
    destination: Path, dtype: str, *, stages: str = "python", device: str | None = None, name: str = "proteus"
) -> None:
    """Refuse what no bundle of this dtype could become, before any work. Raises InputError.

    A folder with anything in it is never replaced: other models may be among its own.
    """
    if stages not in get_args(Backend):
        raise InputError(f"stages are {stages!r}; choose from {', '.join(get_args(Backend))}")
    if device is not None and device not in _KINDS:
        raise InputError(f"the stages' device is {device!r}; choose from {', '.join(_KINDS)}, or None")
    if stages == "tensorrt" and device == "cpu":
        raise InputError("the stages' device is 'cpu'; TensorRT runs on 'cuda': leave it out")
    if _NAME.fullmatch(name) is None:
        raise InputError(f"the model's name is {name!r}; it is 1 to 100 letters, digits, - and _")
    if dtype == "bf16" and stages != "tensorrt":
        raise InputError(
            f"the bundle is bf16, which {stages} stages can't take: ONNX Runtime gets its tensors from NumPy "
            "in the one, and Triton's ONNX Runtime backend has no BF16 in the other; choose tensorrt stages, "
            "or export with --dtype fp16 or fp32"
        )
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(
            f"{destination} already exists and is not empty; a repository goes into a folder of its own: "
            "choose another, or remove it"
        )


def write_repository(
    bundle: Bundle,
    destination: Path,
    *,
    stages: Backend = "python",
    device: str | None = None,
    name: str = "proteus",
    files: Placing = "copy",
    report: Report = no_report,
) -> list[ModelConfig]:
    """Write the repository to `destination`, in one rename, and return its models, the loop first.

    stages: what runs the networks in the server. "tensorrt" takes the engines that `build --flavour tensorrt`
    made, of every target; "onnxruntime" is Triton's own backend; "python" is a process for each network,
    which runs ONNX Runtime.
    device: of the stages, "cpu" or "cuda"; None is "cuda" for tensorrt and "cpu" for the others.
    name: of the loop's model; those of the networks begin with it.
    files: "copy", or "link": hard links to the bundle's networks, which take no space.
    Raises InputError, BundleError or BackendError; then nothing is written.
    """
    check_repository(destination, bundle.dtype, stages=stages, device=device, name=name)
    if files not in get_args(Placing):
        raise InputError(f"files is {files!r}; choose from {', '.join(get_args(Placing))}")
    _check_bundle(bundle, stages)
    engines = _engines(bundle) if stages == "tensorrt" else []
    kind = _KINDS[device or ("cuda" if stages == "tensorrt" else "cpu")]
    loop = video_config(name)
    models = [loop]
    with atomic_directory(destination) as folder:
        version = _write_model(folder, loop)
        _write_code(version, "The denoising loop, which calls the other models", "triton_loop")
        for file in bundle.pipeline_files:
            _place(bundle.folder / file, version / "bundle" / file, "copy")
        graphs = bundle.table.graphs
        for index, graph in enumerate(graphs):
            report("write the Triton repository", index, len(graphs))
            config = _stage_config(bundle, graph, f"{name}_{graph.name}", stages, kind, engines)
            models.append(config)
            version = _write_model(folder, config)
            if stages == "tensorrt":
                for engine in engines:
                    _place(engine.file(graph.name), version / _plan(engine), files)
                continue
            _place_onnx(bundle, graph, version, files)
            if stages == "python":
                _write_code(version, f"The graph {graph.name} under ONNX Runtime", "triton_stage")
        report("write the Triton repository", len(graphs), len(graphs))
    return models


def _check_bundle(bundle: Bundle, stages: Backend) -> None:
    if not any(file.startswith("face_encoder/") for file in bundle.pipeline_files):
        raise BundleError(
            f"{bundle.folder} came without face_encoder/, so it can't read the photo that a request brings; "
            "export a checkpoint that has it"
        )
    if stages == "tensorrt":
        return
    refuse_custom_operators(bundle, "ONNX Runtime")
    if missing := missing_kernels(bundle.manifest):
        raise BackendError(f"{missing}; build engines and choose tensorrt stages, or export another recipe")
    quantised = [
        graph.name for graph in bundle.table.graphs if quantised_formats(bundle.manifest, graph.name)
    ]
    if quantised and stages == "onnxruntime":
        raise BackendError(
            f"{', '.join(quantised)}: quantised graphs need settings of ONNX Runtime that a Triton model "
            "can't ask for; choose python stages, which set them, or tensorrt"
        )


def _engines(bundle: Bundle) -> list[EngineSet]:
    """Engines that Triton's TensorRT backend loads. Raises BundleError where there are none, or not all."""
    every = [bundle.engines(target) for target in bundle.targets]
    found = [engines for engines in every if engines.document.get("flavour") == "tensorrt"]
    way_out = (
        f"on the GPU that will serve: proteus-deploy build {bundle.folder} --flavour tensorrt --target smXX; "
        "or choose onnxruntime or python stages"
    )
    if not found:
        built = ", ".join(f"{one.target} with {one.document.get('flavour')}" for one in every) or "none"
        raise BundleError(
            f"{bundle.folder} has no engine that Triton's TensorRT backend loads (built: {built}); it needs "
            f"those of the package tensorrt, built {way_out}"
        )
    for engines in found:
        missing = [graph.name for graph in bundle.table.graphs if graph.name not in engines.graphs]
        if missing:
            raise BundleError(
                f"{engines.folder} has no engine for {', '.join(missing)}; build all stages {way_out}"
            )
        if engines.document.get("options", {}).get("strip_weights"):
            raise BundleError(
                f"{engines.folder} was built with --strip-weights, and Triton refits no engine; build again "
                f"without it {way_out}"
            )
    return found


def _stage_config(
    bundle: Bundle, graph: Graph, name: str, stages: Backend, kind: Kind, engines: Sequence[EngineSet]
) -> ModelConfig:
    inputs, outputs = stage_tensors(graph, bundle.table, bundle.dtype)
    parameters = {}
    if stages == "python" and (formats := quantised_formats(bundle.manifest, graph.name)):
        parameters["formats"] = ",".join(formats)
    return ModelConfig(
        name,
        stages,
        inputs,
        outputs,
        kind,
        plans={_capability(engine.target): _plan(engine) for engine in engines},
        parameters=parameters,
    )


def _capability(target: str) -> str:
    """ "sm89" -> "8.9", "sm120" -> "12.0"."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _plan(engine: EngineSet) -> str:
    return f"model.{engine.target}.plan"


def _write_model(folder: Path, config: ModelConfig) -> Path:
    """Make the model's folder with its config; the folder of its version 1."""
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    (folder / config.name / "config.pbtxt").write_text(config.to_text(), encoding="ascii")
    return version


def _write_code(version: Path, what: str, module: str) -> None:
    (version / "model.py").write_text(_MODEL.format(what=what, module=module), encoding="utf-8")


def _place_onnx(bundle: Bundle, graph: Graph, version: Path, files: Placing) -> None:
    """The graph as model.onnx; its data beside it under their own name, by which the graph asks for them."""
    record = bundle.manifest["graphs"][graph.name]
    for file in record["files"]:
        name = "model.onnx" if file == record["file"] else Path(file).name
        _place(bundle.folder / file, version / name, files)


def _place(source: Path, destination: Path, files: Placing) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if files == "copy":
        shutil.copyfile(source, destination)
        return
    try:
        os.link(source, destination)
    except OSError as error:
        raise InputError(
            f"{source} can't be linked into {destination.parent} ({error.strerror}); put the repository on "
            "the bundle's file system, or choose copies"
        ) from error
