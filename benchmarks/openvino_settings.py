"""One denoiser step in OpenVINO under each setting that could matter, side by side.

    python -m proteus_deploy.benchmarks.openvino_settings BUNDLE --size mini [--only NAME ...] [--output FILE]

BUNDLE was exported from the checkpoint of --size. Every round runs each setting once; a row's ratio is the
median over the rounds of its processor time to the baseline's in the same round, since other programs take
turns from the wall clock. The error is relative to the eager float32 reference. The baseline is what a user
gets who sets the precision and nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.sizes import SIZES, open_size
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import InputError
from proteus_deploy.runtime.backend import resolve_dtype
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.runtime.openvino_backend import (
    openvino_core,
    tensor_from_openvino,
    tensor_to_openvino,
)
from proteus_deploy.stages import Graph, sample_inputs
from proteus_deploy.testing import relative_error

BASELINE = "precision only"
# Not among them: CPU_DENORMALS_OPTIMIZATION. It changes how the calling process counts, for good.
# What is laid over the precision, by the name of the row. Two rows differ in how they are run instead.
SETTINGS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "latency hint": {"PERFORMANCE_HINT": "LATENCY"},
    "throughput hint": {"PERFORMANCE_HINT": "THROUGHPUT"},
    "hyper-threads": {"ENABLE_HYPER_THREADING": True},
    "no pinning": {"ENABLE_CPU_PINNING": False},
    "performance cores": {"SCHEDULING_CORE_TYPE": "PCORE_ONLY"},
    "accuracy mode": {"INFERENCE_PRECISION_HINT": "dynamic", "EXECUTION_MODE_HINT": "ACCURACY"},
    "no dynamic quantisation": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "fixed sizes": {},
    "inputs kept": {},
}
_EVERY_STEP = ("latents", "timestep")

Step = Callable[[], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", choices=SIZES, default="mini", help="what the bundle was exported from")
    parser.add_argument("--only", action="append", choices=tuple(SETTINGS), help="repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="result file, JSON")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle, hashes=False)
    graph, sizes = bundle.table.graph("denoiser"), bundle.table.sizes("opt")
    dtypes = {"float": resolve_dtype(bundle.dtype), "float32": torch.float32, "int64": torch.int64}
    inputs = {
        name: value.to(dtypes[graph.input(name).dtype]) for name, value in sample_inputs(graph, sizes).items()
    }
    reference = _reference(bundle, arguments.size, inputs)
    names = [name for name in SETTINGS if name == BASELINE or name in (arguments.only or SETTINGS)]
    steps, compile_s, outputs = {}, {}, {}
    for name in names:
        started = time.perf_counter()
        steps[name] = open_step(bundle, graph, name, sizes, inputs)
        compile_s[name] = time.perf_counter() - started
        outputs[name] = steps[name]()  # the first run also lays out the weights
    busy: dict[str, list[float]] = {name: [] for name in names}
    seconds = interleave({name: _timed(steps[name], busy[name]) for name in names}, arguments.rounds)
    rows = [row_of(name, seconds[name], busy, compile_s[name], outputs[name], reference) for name in names]
    for row in rows:
        median = row["processor_ms"]["median"]
        print(f"{row['setting']:24} {median:8.0f} ms  x{row['ratio']:.3f}  error {row['error']:.1e}")
    result = {
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parent.parent),
        "settings": {
            "size": arguments.size,
            "precision": bundle.dtype,
            "shape": {symbol: sizes[symbol] for symbol in graph.symbols},
            "rounds": arguments.rounds,
        },
        "rows": rows,
    }
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))
    return 0


def _reference(bundle: Bundle, size: str, inputs: dict[str, Tensor]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_size(size, Path(folder))
        if checkpoint.hash != bundle.manifest["checkpoint"]["hash"]:
            raise InputError(f"{bundle.folder} was not exported from the checkpoint of --size {size}")
        eager = EagerBackend(checkpoint, table=bundle.table, folded=True)
        wide = {name: v.float() if v.is_floating_point() else v for name, v in inputs.items()}
        return eager.runner("denoiser")(**wide)["velocity"]


def open_step(
    bundle: Bundle, graph: Graph, name: str, sizes: dict[str, int], inputs: dict[str, Tensor]
) -> Step:
    """The denoiser compiled under the named setting; a call runs it on `inputs` and gives the velocity."""
    core = openvino_core()
    model = core.read_model(str(bundle.onnx_file("denoiser")))
    if name == "fixed sizes":
        model.reshape({spec.name: list(spec.shape(sizes)) for spec in graph.inputs})
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if bundle.dtype == "bf16" else "f32"}
    compiled = core.compile_model(model, "CPU", {**precision, **SETTINGS[name]})
    request = compiled.create_infer_request()
    if name == "inputs kept":
        for key, value in inputs.items():
            request.set_tensor(key, tensor_to_openvino(value))

    def step() -> Tensor:
        given = {key: inputs[key] for key in (_EVERY_STEP if name == "inputs kept" else inputs)}
        request.infer({key: tensor_to_openvino(value) for key, value in given.items()}, share_inputs=False)
        return tensor_from_openvino(request.get_tensor("velocity"))

    return step


def _timed(step: Step, busy: list[float]) -> Step:
    def run() -> Tensor:
        started = time.process_time()
        output = step()
        busy.append(time.process_time() - started)
        return output

    return run


def row_of(
    name: str,
    seconds: list[float],
    busy: dict[str, list[float]],
    compile_s: float,
    output: Tensor,
    reference: Tensor,
) -> dict[str, Any]:
    """One row of the result file. seconds: wall, of this setting; busy: processor seconds of all."""
    ratios = [mine / base for mine, base in zip(busy[name], busy[BASELINE], strict=True)]
    return {
        "setting": name,
        "options": SETTINGS[name],
        "latency_ms": Spread.of(seconds).milliseconds(),
        "processor_ms": Spread.of(busy[name]).milliseconds(),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "compile_s": compile_s,
        "error": relative_error(output.float(), reference),
    }


if __name__ == "__main__":
    sys.exit(main())
