"""The denoiser on the fused kernels against the plain one, on the weights of the miniature checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BackendError
from proteus_deploy.kernels import launch
from proteus_deploy.model.fused_block import FusedBlock
from proteus_deploy.model.networks import Kernels
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, Tolerance, assert_close

SAME = Tolerance(1e-5, "relative", "float32 rounding: sums in another order, identity attention folded")


@pytest.fixture(name="checkpoint")
def _checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_velocities_are_the_same(checkpoint: Checkpoint, device: torch.device, gate: float) -> None:
    plain, fused = (
        EagerBackend(checkpoint, device=str(device), kernels=kernels) for kernels in ("reference", "triton")
    )
    assert (plain.name, fused.name) == ("eager", "eager-triton")
    graph = plain.table.graph("denoiser")
    inputs = sample_inputs(graph, plain.table.sizes("opt") | {"B": 2})
    inputs["identity_gate"] *= gate
    moved = {name: value.to(device) for name, value in inputs.items()}
    want = plain.runner("denoiser")(**moved)["velocity"]
    got = fused.runner("denoiser")(**moved)["velocity"]
    assert_close("velocity", got, want, SAME)


def test_the_fused_denoiser_has_the_same_parameters(checkpoint: Checkpoint) -> None:
    plain = NetworkFactory(checkpoint)("denoiser").module
    fused = NetworkFactory(checkpoint, kernels="triton")("denoiser").module
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in fused.state_dict().items()
    }
    assert any(isinstance(module, FusedBlock) for module in fused.modules())


def test_two_forms_share_their_weights(checkpoint: Checkpoint, device: torch.device) -> None:
    plain = EagerBackend(checkpoint, device=str(device))
    fused = EagerBackend(checkpoint, device=str(device), kernels="triton", weights_of=plain)
    theirs = dict(plain.runner("denoiser").module.named_parameters())
    for name, weight in fused.runner("denoiser").module.named_parameters():
        assert weight.data_ptr() == theirs[name].data_ptr()
    graph = plain.table.graph("denoiser")
    inputs = sample_inputs(graph, plain.table.sizes("opt"))
    moved = {name: value.to(device) for name, value in inputs.items()}
    ours, want = (one.runner("denoiser")(**moved)["velocity"] for one in (fused, plain))
    assert_close("velocity", ours, want, SAME)
    with pytest.raises(BackendError, match=r"can't be shared by a backend in torch\.bfloat16"):
        EagerBackend(checkpoint, device=str(device), dtype=torch.bfloat16, weights_of=plain)


def test_without_gpu_or_interpreter_they_are_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_is_interpreted", lambda _: False)
    with pytest.raises(BackendError, match=r"the device is cpu; take kernels='reference'"):
        EagerBackend(checkpoint, kernels="triton")


@pytest.mark.parametrize(
    ("kernels", "attention"),
    [("reference", "triton"), ("reference", "triton-int8"), ("triton", "triton-int8")],
)
def test_attention_is_chosen_with_or_without_the_other_kernels(
    checkpoint: Checkpoint, device: torch.device, kernels: Kernels, attention: str
) -> None:
    plain = EagerBackend(checkpoint, device=str(device))
    chosen = EagerBackend(checkpoint, device=str(device), kernels=kernels, attention=attention)
    assert chosen.name == ("eager-triton" if kernels == "triton" else "eager") + f"-attention-{attention}"
    graph = plain.table.graph("denoiser")
    inputs = sample_inputs(graph, plain.table.sizes("min"))
    moved = {name: value.to(device) for name, value in inputs.items()}
    want, got = (one.runner("denoiser")(**moved)["velocity"] for one in (plain, chosen))
    bound = SAME if attention == "triton" else TOLERANCES["attention", "int8"]
    error = assert_close("velocity", got, want, bound)
    # The residual stream damps what attention's 8 bits add, but it can't vanish in float32's rounding.
    assert attention == "triton" or error > SAME.bound


def test_an_attention_that_cannot_run_is_refused_before_any_weight(checkpoint: Checkpoint) -> None:
    with pytest.raises(BackendError, match="attention 'flash' is unknown; there are torch, cpu-bf16, triton"):
        EagerBackend(checkpoint, attention="flash")
    with pytest.raises(BackendError, match="'sage' runs on CUDA devices, and the device is cpu"):
        EagerBackend(checkpoint, attention="sage", dtype=torch.bfloat16)
