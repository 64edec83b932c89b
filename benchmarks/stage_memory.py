"""The memory that one graph takes on one backend, measured in a process of its own.

    python -m proteus_deploy.benchmarks.stage_memory denoiser --backend onnxruntime --bundle DIR

prints one JSON object: bytes by which the process grew over what it was with its libraries loaded: most while
loading, after loading, most while running.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy.benchmarks.candidate_process import peak_memory
from proteus_deploy.errors import InputError

__all__ = ["BACKENDS", "measure_graph"]

BACKENDS = ("onnxruntime", "eager")
_TIMEOUT_S = 900


def measure_graph(
    graph: str, backend: str, *, bundle: Path, size: str, work: Path, symbols: Mapping[str, int]
) -> dict[str, Any]:
    """{loading_bytes, loaded_bytes, running_bytes}, or {reason} where the process failed.

    symbols: sizes of the graph's axes. The eager backend takes the checkpoint of `size` (sizes.py).
    """
    command = [sys.executable, "-m", "proteus_deploy.benchmarks.stage_memory", graph, "--backend", backend]
    command += ["--bundle", str(bundle), "--size", size, "--work", str(work)]
    command += ["--symbols", json.dumps(dict(symbols))]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        return {"reason": f"exit code {error.returncode}: {error.stderr.strip()[-300:]}"}
    except subprocess.TimeoutExpired:
        return {"reason": f"took longer than {_TIMEOUT_S} s"}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def resident_memory() -> int:
    """Bytes resident now; from here on the peak counts anew. Raises InputError where /proc can't say."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS
    except OSError as error:
        raise InputError(f"peak memory can't be measured here: /proc/self/clear_refs: {error}") from error
    found = peak_memory()
    if found is None:
        raise InputError("peak memory can't be measured here: /proc/self/status has no VmHWM")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("graph")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--symbols", type=json.loads, required=True)
    given = parser.parse_args(arguments)

    import torch

    from proteus_deploy.benchmarks.sizes import open_size
    from proteus_deploy.bundle import Bundle
    from proteus_deploy.runtime.backend import Backend, bind_sizes
    from proteus_deploy.runtime.eager import EagerBackend
    from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeBackend
    from proteus_deploy.stages import sample_inputs

    torch.set_num_threads(1)
    bundle = Bundle.open(given.bundle, hashes=False)
    backend: Backend = OnnxRuntimeBackend(bundle, threads=1)
    if given.backend == "eager":
        backend = EagerBackend(open_size(given.size, given.work), table=bundle.table)
    graph = bundle.table.graph(given.graph)
    inputs = sample_inputs(graph, given.symbols)
    bind_sizes(graph, inputs)
    _load_libraries(torch)
    held = sum(tensor.nbytes for tensor in inputs.values())
    before = resident_memory()
    with torch.inference_mode():
        runner = backend.runner(graph.name)
        loading = peak_memory() or before
        loaded = resident_memory()
        outputs = runner(**inputs)
    running = peak_memory() or loaded
    assert outputs
    # Inputs were made before; a request would make them for this graph.
    measured = {"loading_bytes": loading - before, "loaded_bytes": loaded - before}
    print(json.dumps({**measured, "running_bytes": running - before + held}))
    return 0


def _load_libraries(torch: Any) -> None:
    """What the runtimes load and set up when they first work isn't the graph's."""
    import onnx
    import onnxruntime

    value = onnx.helper.make_tensor_value_info
    ends = [value("x", onnx.TensorProto.FLOAT, [64, 64])], [value("y", onnx.TensorProto.FLOAT, [64, 64])]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "one", *ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": torch.ones(64, 64).numpy()})
    with torch.inference_mode():
        rows = torch.ones(1, 2, 64, 64)
        torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)
        torch.nn.functional.linear(rows, torch.ones(64, 64))
        torch.nn.functional.conv3d(torch.ones(1, 8, 3, 16, 16), torch.ones(8, 8, 3, 3, 3))


if __name__ == "__main__":
    raise SystemExit(main())
