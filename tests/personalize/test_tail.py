"""The differentiable tail: the pipeline's own video, and gradients that finite differences confirm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proteus_deploy import GenerateRequest, Pipeline
from proteus_deploy.adapters import TimestepGate
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.personalize.networks import DifferentiableBackend
from proteus_deploy.personalize.tail import Head, TailSampler

STEPS = 5
GATE = TimestepGate(0, 500)  # of the timesteps 999, 799, 599, 399 and 199 the last two


@pytest.fixture(scope="module")
def backend(parity: Path) -> DifferentiableBackend:
    return DifferentiableBackend.of_checkpoint(Checkpoint.open(parity / "checkpoint"))


@pytest.fixture(scope="module")
def pipeline(parity: Path, backend: DifferentiableBackend) -> Pipeline:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    parts = (checkpoint.vae, checkpoint.scheduler, checkpoint.tokenizer, checkpoint.face_encoder)
    return Pipeline(backend, checkpoint.transformer, *parts)


@pytest.fixture
def request_(small_request: Callable[..., GenerateRequest]) -> GenerateRequest:
    return small_request(num_inference_steps=STEPS)


class Trainable:
    """One adapter of rank 2 on every projection, active in the gate, whose factors take gradients."""

    def __init__(self, pipeline: Pipeline) -> None:
        backbone = pipeline.config.backbone
        shape = (1, backbone.num_layers, 4, 2, backbone.width)
        generator = torch.Generator().manual_seed(0)
        self.down = (0.1 * torch.randn(shape, generator=generator)).requires_grad_()
        self.up = (0.1 * torch.randn(shape, generator=generator)).requires_grad_()

    def __call__(self, timestep: int, rows: int) -> Mapping[str, Tensor]:
        scale = torch.full((1, 2), float(GATE.active(timestep)))
        return {"adapter_down": self.down, "adapter_up": self.up, "adapter_scale": scale}


@pytest.mark.parametrize("scheduler", ["dpm", "ddim"])
def test_it_makes_the_pipelines_latents(
    pipeline: Pipeline, backend: DifferentiableBackend, small_request: Any, scheduler: str
) -> None:
    request = small_request(num_inference_steps=STEPS, scheduler=scheduler)
    expected: list[Tensor] = []
    video = pipeline.generate(request, on_step=lambda event: expected.append(event.latents))
    sampler = TailSampler(backend, GATE)
    head = sampler.head(pipeline.start(request))
    assert head.index == 3
    assert torch.equal(head.latents, expected[2])
    for _ in range(2):  # a head serves any number of tails
        latents = sampler.finish(head, None)
        assert torch.allclose(latents, expected[-1], atol=1e-6)
    frames = sampler.frames(head, latents).detach()
    assert torch.allclose(frames, video.frames[0, :8], atol=1e-5)


def test_gradients(pipeline: Pipeline, backend: DifferentiableBackend, request_: GenerateRequest) -> None:
    """Along a direction they are what finite differences of the loss are."""
    sampler = TailSampler(backend, GATE, gradient_steps=2)
    head = sampler.head(pipeline.start(request_))
    adapter = Trainable(pipeline)

    def loss() -> Tensor:
        frames = sampler.frames(head, sampler.finish(head, adapter))
        return frames[..., ::3].square().mean()

    loss().backward()
    assert adapter.up.grad is not None
    direction = adapter.up.grad / adapter.up.grad.norm()
    slope, size = float((adapter.up.grad * direction).sum()), 0.02
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            adapter.up += sign * size * direction
            values.append(float(loss()))
            adapter.up -= sign * size * direction
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(slope, rel=0.005)


def test_steps_before_the_last_carry_none(
    pipeline: Pipeline, backend: DifferentiableBackend, request_: GenerateRequest
) -> None:
    """With one step of gradients, the one before it still uses the adapter."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for steps in (1, 2):
        sampler = TailSampler(backend, GATE, gradient_steps=steps)
        head: Head = sampler.head(pipeline.start(request_))
        adapter = Trainable(pipeline)
        latents = sampler.finish(head, adapter)
        latents.square().sum().backward()
        assert adapter.up.grad is not None
        found[steps] = latents.detach(), adapter.up.grad.clone()
    assert torch.equal(found[1][0], found[2][0])
    assert not torch.allclose(found[1][1], found[2][1], rtol=0.01)


def test_wrong_settings(
    pipeline: Pipeline, backend: DifferentiableBackend, request_: GenerateRequest
) -> None:
    with pytest.raises(InputError, match="gradient_steps is 0"):
        TailSampler(backend, GATE, gradient_steps=0)
    sampler = TailSampler(backend, TimestepGate(0, 100))
    with pytest.raises(InputError, match="none of the 5 timesteps lies in the gate 0 to 100"):
        sampler.head(pipeline.start(request_))
