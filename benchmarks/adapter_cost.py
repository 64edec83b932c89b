"""What room for adapters costs a step, and how long another adapter takes to be there.

    python -m proteus_deploy.benchmarks.adapter_cost --json FILE [--size mini] [--rank 16] [--rounds 9]

One denoiser in float32 on ONNX Runtime, exported with and without inputs for adapters; turn by turn a step
without the inputs, one with them idle (rank 1, zeros), one with an adapter of `--rank` on every projection.
Swapping: from the file, and from memory, to inputs that are ready for the next step; the graph isn't touched.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.adapters import Adapter, AdapterUse, read_adapter, save_adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.adapters.inputs import ADAPTER_INPUTS, idle_adapters, stack_adapters
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.sizes import SIZES, open_size
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.export.onnx_graph import export_graph
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.model.low_rank import PROJECTIONS
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph
from proteus_deploy.runtime.onnxruntime_session import PROVIDERS, open_session
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.stages import StageTable, sample_inputs

__all__ = ["main"]

_TIMESTEP = 100  # all gates are open


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(prog="adapter_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    check_writable(options.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = open_size(options.size, folder)
        backbone = checkpoint.transformer.backbone
        adapter = _made_up(backbone, options.rank)
        active = _inputs_of(adapter, backbone)
        _report("export the denoiser without room for adapters")
        plain = _open(checkpoint, build_stage_table(checkpoint), folder / "plain.onnx")
        _report(f"export it with room for rank {options.rank}")
        table = build_stage_table(checkpoint, ExportRanges(max_lora_rank=options.rank))
        roomy = _open(checkpoint, table, folder / "roomy.onnx")
        samples = sample_inputs(table.graph("denoiser"), table.sizes("opt"))
        inputs = {name: value for name, value in samples.items() if name not in ADAPTER_INPUTS}
        idle = idle_adapters(table.graph("denoiser"), torch.float32, torch.device("cpu"))
        steps = {
            "without room": _step(plain, inputs),
            "idle": _step(roomy, inputs | idle),
            "adapter": _step(roomy, inputs | active),
        }
        outputs = {name: step() for name, step in steps.items()}  # the first run lays out the weights
        error = float((outputs["without room"] - outputs["idle"]).abs().max())
        _report(f"time {options.rounds} rounds")
        seconds = interleave(steps, options.rounds)
        swaps = _swaps(adapter, backbone, folder / "adapter.safetensors", options.rounds)
    medians = {name: Spread.of(found).median for name, found in seconds.items()}
    ratios = {name: medians[name] / medians["without room"] for name in ("idle", "adapter")}
    document = {
        "what": "a step with and without inputs for adapters, and swapping one",
        "settings": {
            "size": options.size,
            "rank": options.rank,
            "rounds": options.rounds,
            "backend": "onnxruntime",
            "precision": "fp32",
            "shape": {name: list(value.shape) for name, value in inputs.items()},
        },
        "step_ms": {name: Spread.of(found).milliseconds() for name, found in seconds.items()},
        "ratio": ratios,
        "swap_ms": {name: Spread.of(found).milliseconds() for name, found in swaps.items()},
        "adapter_bytes": sum(value.nbytes for value in active.values()),
        "idle_differs_by": error,
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(options.json, document)
    for name, spread in document["step_ms"].items():  # type: ignore[attr-defined]
        _report(f"{name:14} {spread['median']:8.1f} ms")
    for name, spread in document["swap_ms"].items():  # type: ignore[attr-defined]
        _report(f"swap from {name:8} {spread['median']:8.1f} ms")
    return 0


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _made_up(config: BackboneConfig, rank: int) -> Adapter:
    """Of every projection; what the numbers are costs no time."""
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return 0.01 * torch.randn(shape, generator=generator)

    modules = [
        f"transformer_blocks.{block}.attn1.{name}"
        for block in range(config.num_layers)
        for name in PROJECTIONS
    ]
    width = config.width
    return Adapter({name: Factors(factor(rank, width), factor(width, rank)) for name in modules})


def _inputs_of(adapter: Adapter, config: BackboneConfig) -> dict[str, Tensor]:
    """Of the denoiser, for one video, with no more room than the adapter's own rank."""
    uses, cpu = [(AdapterUse(adapter),)], torch.device("cpu")
    stacked = stack_adapters(uses, config, torch.float32, cpu, most=adapter.rank)
    assert stacked is not None
    return stacked.at(_TIMESTEP, 2)


def _open(checkpoint: Checkpoint, table: StageTable, file: Path) -> OnnxRuntimeGraph:
    graph = table.graph("denoiser")
    network = NetworkFactory(checkpoint, folded=True)("denoiser")
    export_graph(graph, table, network, file, dtype=torch.float32)
    return OnnxRuntimeGraph(graph, open_session(file, PROVIDERS["cpu"], None))


def _step(runner: OnnxRuntimeGraph, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: runner(**inputs)["velocity"]


def _swaps(adapter: Adapter, config: BackboneConfig, file: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds until the denoiser's inputs are there."""
    save_adapter(adapter, file)

    swaps: dict[str, Callable[[], object]] = {
        "file": lambda: _inputs_of(read_adapter(file), config),
        "memory": lambda: _inputs_of(adapter, config),
    }
    return interleave(swaps, rounds)


if __name__ == "__main__":
    sys.exit(main())
