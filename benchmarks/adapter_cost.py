"""What room for adapters costs a step, and how long another adapter takes to be there.

One denoiser in float32 on ONNX Runtime, exported with and without inputs for adapters; turn by turn a step
without the inputs, one with them idle (rank 1, zeros), one with an adapter on every projection. Swapping:
from the file, and from memory, to inputs that are ready for the next step; the graph isn't touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proteus_deploy.adapters import Adapter, AdapterUse, read_adapter, save_adapter
from proteus_deploy.adapters.adapter import Factors
from proteus_deploy.adapters.inputs import ADAPTER_INPUTS, idle_adapters, stack_adapters
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import AdapterError
from proteus_deploy.export.onnx_graph import export_graph
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.model.low_rank import MOST_RANK, PROJECTIONS
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.onnxruntime_session import PROVIDERS, open_session
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph
from proteus_deploy.stage_table import ExportRanges, build_stage_table
from proteus_deploy.stages import StageTable, sample_inputs

__all__ = ["HEADERS", "made_up_adapter", "measure_adapters", "table"]

HEADERS = ("adapters", "ms", "")
_TIMESTEP = 100  # all gates are open


def measure_adapters(
    checkpoint: Checkpoint, size: str, folder: Path, *, rank: int, rounds: int, report: Report = no_report
) -> dict[str, Any]:
    """The result document. size: what the checkpoint is called. folder: for graphs and a file.

    Raises AdapterError for a rank out of range.
    """
    if not 1 <= rank <= MOST_RANK:
        raise AdapterError(f"the rank is {rank}; choose 1 to {MOST_RANK}")
    backbone = checkpoint.transformer.backbone
    adapter = made_up_adapter(backbone, rank)
    active = _inputs_of(adapter, backbone)
    report("denoiser without and with room for adapters", 0, 2)
    plain = _open(checkpoint, build_stage_table(checkpoint), folder / "plain.onnx")
    report("denoiser without and with room for adapters", 1, 2)
    contracts = build_stage_table(checkpoint, ExportRanges(max_lora_rank=rank))
    roomy = _open(checkpoint, contracts, folder / "roomy.onnx")
    report("denoiser without and with room for adapters", 2, 2)
    samples = sample_inputs(contracts.graph("denoiser"), contracts.sizes("opt"))
    inputs = {name: value for name, value in samples.items() if name not in ADAPTER_INPUTS}
    idle = idle_adapters(contracts.graph("denoiser"), torch.float32, torch.device("cpu"))
    steps = {
        "without room": _step(plain, inputs),
        "idle": _step(roomy, inputs | idle),
        "adapter": _step(roomy, inputs | active),
    }
    outputs = {name: step() for name, step in steps.items()}  # the first run lays out the weights
    seconds = interleave(steps, rounds, before=lambda number: report("rounds", number, rounds))
    report("rounds", rounds, rounds)
    swaps = _swaps(adapter, backbone, folder / "adapter.safetensors", rounds)
    medians = {name: Spread.of(found).median for name, found in seconds.items()}
    return {
        "what": "a step with and without inputs for adapters, and swapping one",
        "settings": {
            "size": size,
            "rank": rank,
            "rounds": rounds,
            "backend": "onnxruntime",
            "precision": "fp32",
            "shape": {name: list(value.shape) for name, value in inputs.items()},
        },
        "step_ms": {name: Spread.of(found).milliseconds() for name, found in seconds.items()},
        "ratio": {name: medians[name] / medians["without room"] for name in ("idle", "adapter")},
        "swap_ms": {name: Spread.of(found).milliseconds() for name, found in swaps.items()},
        "adapter_bytes": sum(value.nbytes for value in active.values()),
        "idle_differs_by": float((outputs["without room"] - outputs["idle"]).abs().max()),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }


def table(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows under `HEADERS`."""
    ratios = {"without room": 1.0, **document["ratio"]}
    rows = [
        (f"a step, {name}", f"{spread['median']:.1f}", f"{ratios[name]:.3f}x")
        for name, spread in document["step_ms"].items()
    ]
    swaps = document["swap_ms"].items()
    return rows + [(f"another adapter, from {name}", f"{spread['median']:.1f}", "") for name, spread in swaps]


def made_up_adapter(config: BackboneConfig, rank: int, seed: int = 0) -> Adapter:
    """Of every projection; what the numbers are costs no time."""
    generator = torch.Generator().manual_seed(seed)

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
