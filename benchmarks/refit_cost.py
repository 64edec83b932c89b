"""How long an engine takes to be another person's, beside a step of it. Built, not run, for want of a GPU.

    proteus-deploy build BUNDLE --target current --refit --stage denoiser
    python -m proteus_deploy.benchmarks.refit_cost BUNDLE --rank 16 --json FILE

Turn by turn: a step, weights of one adapter, of another one, and those of the export again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from proteus_deploy._files import check_writable, write_json
from proteus_deploy.adapters import AdapterUse
from proteus_deploy.adapters.refit import RefitAdapters
from proteus_deploy.benchmarks.adapter_cost import made_up_adapter
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BackendError
from proteus_deploy.model.config import BackboneConfig
from proteus_deploy.runtime.backend import Runner, refits
from proteus_deploy.stages import sample_inputs

__all__ = ["main", "measure_refit"]

_TIMESTEP = 100  # all gates are open


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(prog="refit_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args(arguments)
    check_writable(given.json)
    from proteus_deploy.runtime.tensorrt_backend import TensorRTBackend

    bundle = Bundle.open(given.bundle)
    backend = TensorRTBackend(bundle)
    try:
        found = measure_refit(backend, bundle.transformer.backbone, given.rank, given.rounds)
    finally:
        backend.close()
    document = {
        "what": "a step of the denoiser's engine, and giving it the weights of another adapter",
        "settings": {"rank": given.rank, "rounds": given.rounds, "precision": bundle.dtype},
        "milliseconds": found,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(Path(__file__).resolve().parents[1]),
    }
    write_json(given.json, document)
    for name, spread in found.items():
        print(f"{name}: {spread['median']:.1f} ms")
    return 0


def measure_refit(backend: Any, config: BackboneConfig, rank: int, rounds: int) -> dict[str, Any]:
    """{"step", "refit", "another", "back": spreads in milliseconds}, turn by turn.

    A step ends when its velocity is on the host. Raises BackendError for a backend that takes no others.
    """
    if not refits(backend):
        raise BackendError(
            f"backend {backend.name!r} takes no other weights: its denoiser has inputs for adapters, or its "
            "engines were built without --refit"
        )
    graph, sizes = backend.table.graph("denoiser"), backend.table.sizes("opt")
    inputs = {
        name: value.to(backend.device, backend.dtype if graph.input(name).dtype == "float" else None)
        for name, value in sample_inputs(graph, sizes).items()
    }
    adapters = [RefitAdapters(backend, (AdapterUse(made_up_adapter(config, rank, seed)),)) for seed in (0, 1)]
    turns: dict[str, Callable[[], object]] = {
        "step": partial(_step, backend.runner("denoiser"), inputs),
        "refit": lambda: adapters[0].at(_TIMESTEP, 1),
        "another": lambda: adapters[1].at(_TIMESTEP, 1),
        "back": lambda: RefitAdapters(backend, ()).at(_TIMESTEP, 1),
    }
    for turn in turns.values():  # what the first calls load is loaded by then
        turn()
    return {name: Spread.of(seconds).milliseconds() for name, seconds in interleave(turns, rounds).items()}


def _step(runner: Runner, inputs: Mapping[str, Tensor]) -> Tensor:
    return runner(**inputs)["velocity"].cpu()


if __name__ == "__main__":
    raise SystemExit(main())
