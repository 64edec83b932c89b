"""The PyTorch backends: the reference, its lower precisions, and the compiled one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from proteus_deploy import BackendError, InputError, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.model.networks import Network
from proteus_deploy.runtime.eager import EagerBackend, default_dtype
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close


@pytest.fixture
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


def test_graphs_are_kept_until_they_are_released(checkpoint: Checkpoint) -> None:
    backend = EagerBackend(checkpoint)
    assert (backend.name, backend.checks_ranges, backend.dtype) == ("eager", False, torch.float32)
    first = backend.runner("identity_schedule")
    assert backend.runner("identity_schedule") is first
    backend.release("identity_schedule")
    backend.release("denoiser")
    again = backend.runner("identity_schedule")
    assert again is not first
    backend.close()
    assert backend.runner("identity_schedule") is not again


def test_threads_that_need_a_network_at_once_read_it_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    materialise = Network.materialise

    def slow(network: Network, *where: Any) -> Any:
        read.append(type(network).__name__)
        Event().wait(0.2)
        return materialise(network, *where)

    monkeypatch.setattr(Network, "materialise", slow)
    backend = EagerBackend(checkpoint)
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(backend.runner, ["vae_encoder"] * 4)
    assert all(other is first for other in others)
    assert len(read) == 1


def test_networks_are_for_inference_only(checkpoint: Checkpoint) -> None:
    runner = EagerBackend(checkpoint).runner("identity_schedule")
    assert not runner.module.training
    assert not any(parameter.requires_grad for parameter in runner.module.parameters())
    inputs = sample_inputs(runner.graph, {"T": 2, "M": 3, "I": 1})
    assert not runner(**inputs)["face_tokens"].requires_grad


def test_weights_first_read_within_a_request_are_ordinary_tensors(checkpoint: Checkpoint) -> None:
    with torch.inference_mode():
        module = EagerBackend(checkpoint).runner("identity_schedule").module
    assert not any(value.is_inference() for value in module.state_dict().values())
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("graph", ["identity_schedule", "denoiser", "text_encoder", "vae_decoder_first_2"])
def test_lower_precisions(checkpoint: Checkpoint, graph: str, dtype: torch.dtype) -> None:
    low, full = EagerBackend(checkpoint, dtype=dtype), EagerBackend(checkpoint)
    contract = full.table.graph(graph)
    inputs = sample_inputs(contract, full.table.sizes("opt"))
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    cast = {name: value.to(kinds[contract.input(name).dtype]) for name, value in inputs.items()}
    short = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    for name, want in full.runner(graph)(**inputs).items():
        got = low.runner(graph)(**cast)[name]
        assert got.dtype == dtype
        assert_close(f"{graph} {name}", got, want, TOLERANCES["bundle", "graph", short])


def test_unknown_graph_and_broken_contract(checkpoint: Checkpoint) -> None:
    backend = EagerBackend(checkpoint)
    with pytest.raises(InputError, match="no graph 'unet'; the table has text_encoder"):
        backend.runner("unet")
    with pytest.raises(InputError, match=r"text_encoder: input 'input_ids' has shape \[3\]"):
        backend.runner("text_encoder")(input_ids=torch.zeros(3, dtype=torch.int64))


def test_device_that_is_not_here(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="PyTorch sees no CUDA device; use device='cpu'"):
        EagerBackend(checkpoint, device="cuda")


@pytest.mark.parametrize(
    ("amx", "compiled", "device", "dtype"),
    [
        (True, True, "cpu", torch.bfloat16),
        (True, False, "cpu", torch.float32),
        (True, True, "cuda", torch.float32),
        (False, True, "cpu", torch.float32),
    ],
)
def test_default_precision(
    monkeypatch: pytest.MonkeyPatch, amx: bool, compiled: bool, device: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert default_dtype(device, compiled=compiled) == dtype


def test_a_pipeline_takes_the_default_unless_it_is_told(
    parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for given, expected in ((None, torch.bfloat16), ("fp32", torch.float32)):
        with Pipeline.from_checkpoint(parity / "checkpoint", dtype=given, compiled=True) as pipeline:
            assert pipeline.backend.dtype == expected


@pytest.mark.slow
def test_compiled_is_the_same(checkpoint: Checkpoint) -> None:
    compiled, eager = EagerBackend(checkpoint, compiled=True), EagerBackend(checkpoint)
    assert compiled.name == "compiled"
    graph = eager.table.graph("text_encoder")
    inputs = sample_inputs(graph, {"B": 2, "N": 17})
    got, want = (backend.runner(graph.name)(**inputs)["text"] for backend in (compiled, eager))
    assert_close("text", got, want, TOLERANCES["bundle", "graph", "fp32"])
