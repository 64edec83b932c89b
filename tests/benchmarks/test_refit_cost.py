"""What is timed in `refit_cost`, on a backend made of Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy.benchmarks.refit_cost import main, measure_refit
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BackendError
from proteus_deploy.stage_table import build_stage_table


def test_turn_by_turn(parity: Path) -> None:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    table, backbone = build_stage_table(checkpoint), checkpoint.transformer.backbone
    done: list[Any] = []

    def refit(graph: str, key: tuple[Any, ...], deltas: Callable[[], Mapping[str, Tensor]]) -> float:
        names = deltas().keys()
        assert len(names) == (16 if key else 0), "four projections of four blocks"
        done.append((graph, key))
        return 0.0

    def step(**inputs: Tensor) -> dict[str, Tensor]:
        assert set(inputs) == {spec.name for spec in table.graph("denoiser").inputs}
        done.append("step")
        return {"velocity": torch.zeros(1)}

    backend = SimpleNamespace(
        name="stand-in",
        refits=True,
        refit=refit,
        table=table,
        device=torch.device("cpu"),
        dtype=torch.float32,
        runner=lambda graph: {"denoiser": step}[graph],
    )
    found = measure_refit(backend, backbone, rank=4, rounds=2)
    assert list(found) == ["step", "refit", "another", "back"]
    assert all(spread["n"] == 2 for spread in found.values())
    turn = done[:4]
    assert turn[0] == "step"
    assert [graph for graph, _ in turn[1:]] == ["denoiser"] * 3
    first, another, back = (key for _, key in turn[1:])
    assert first != another != back == ()
    backend.refits = False
    with pytest.raises(BackendError, match="takes no other weights"):
        measure_refit(backend, backbone, rank=4, rounds=2)


def test_without_a_gpu(parity_bundle: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match="no CUDA device"):
        main([str(parity_bundle), "--json", str(tmp_path / "refit.json")])
