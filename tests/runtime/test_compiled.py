"""Compiled networks: one size at a time, a limit, sealing, and no step back to eager."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy import BackendError
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.runtime import compiled as module
from proteus_deploy.runtime.compiled import CompiledNetwork
from proteus_deploy.runtime.eager import EagerBackend


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tracing is what these tests are about; code generation would take a minute."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **rest: real(network, **(rest | {"backend": "eager"}))
    )
    yield
    torch.compiler.reset()


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_sizes_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIZES", 2)
    network = CompiledNetwork("doubling", Doubling())
    for size in (3, 4, 3):
        assert torch.equal(network({"N": size}, torch.ones(size)), torch.full((size,), 2.0))
    with pytest.raises(BackendError, match=r"doubling was compiled for 2 sizes already, and N=5 would be"):
        network({"N": 5}, torch.ones(5))
    assert network({"N": 4}, torch.ones(4)).shape == (4,)


def test_sealed_networks_take_known_sizes_only() -> None:
    network = CompiledNetwork("doubling", Doubling())
    network({"N": 3}, torch.ones(3))
    network.seal()
    assert network({"N": 3}, torch.zeros(3)).sum() == 0
    with pytest.raises(BackendError, match=r"doubling is sealed at the 1 sizes .* N=4 is not one of them"):
        network({"N": 4}, torch.ones(4))


class Scaling(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_many_networks_of_one_class_are_all_compiled() -> None:
    """PyTorch counts recompilations of the class's code, and runs what is above its limit as it is."""
    from torch._dynamo.utils import counters

    counters.clear()
    for factor in range(12):
        network = CompiledNetwork("scaling", Scaling(factor))
        assert network({"N": 3}, torch.ones(3)).sum() == 3 * factor
    assert counters["stats"]["unique_graphs"] == 12


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


def test_what_can_only_be_compiled_in_part_is_an_error() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        CompiledNetwork("breaking", Breaking())({"N": 3}, torch.ones(3))


@pytest.fixture
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


def test_a_backend_is_sealed_with_all_its_networks(checkpoint: Checkpoint) -> None:
    from proteus_deploy.stages import sample_inputs

    backend = EagerBackend(checkpoint, compiled=True)
    graph = backend.table.graph("identity_schedule")
    inputs = sample_inputs(graph, {"T": 2, "M": 3, "I": 1})
    warm = backend.runner(graph.name)(**inputs)
    backend.seal()
    again = backend.runner(graph.name)(**inputs)
    assert all(torch.equal(again[name], warm[name]) for name in warm)
    with pytest.raises(BackendError, match=r"identity_schedule is sealed at the 1 sizes .* T=1"):
        backend.runner(graph.name)(**sample_inputs(graph, {"T": 1, "M": 3, "I": 1}))
    fused = backend.table.graph("identity_fusion")
    with pytest.raises(BackendError, match="identity_fusion is sealed at the 0 sizes"):
        backend.runner(fused.name)(**sample_inputs(fused, {"P": 3, "M": 3, "I": 1}))


def test_seal_and_graphs_need_what_they_work_on(checkpoint: Checkpoint) -> None:
    with pytest.raises(BackendError, match="seal is for compiled backends; eager runs any size"):
        EagerBackend(checkpoint).seal()
    for compiled in (True, False):
        with pytest.raises(BackendError, match=f"here compiled is {compiled} and the device cpu"):
            EagerBackend(checkpoint, compiled=compiled, cuda_graphs=True)
