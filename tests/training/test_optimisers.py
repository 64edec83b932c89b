from __future__ import annotations

import pytest
import torch
from torch import nn

from proteus_deploy.training.optimisers import MuonAndAdamW, make_optimiser
from proteus_deploy.training.settings import TrainSettings
from proteus_deploy.training.state import Averages, pack, unpack

MUON = TrainSettings(optimiser="muon", learning_rate=1e-2, weight_decay=0.0)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Module()
    network.proj_in = nn.Linear(6, 8)
    network.transformer_blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    return network


def take_steps(network: nn.Module, optimiser: torch.optim.Optimizer, count: int) -> None:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        hidden = network.get_submodule("proj_in")(inputs)
        for block in network.transformer_blocks:  # type: ignore[union-attr]
            hidden = hidden + block(hidden).tanh()
        optimiser.zero_grad()
        (hidden - 1).square().mean().backward()
        optimiser.step()


def test_adamw_is_the_published_choice() -> None:
    optimiser = make_optimiser(dict(small_network().named_parameters()), TrainSettings())
    assert type(optimiser) is torch.optim.AdamW


def test_muon_takes_the_matrices_inside_blocks_and_nothing_else() -> None:
    network = small_network()
    optimiser = make_optimiser(dict(network.named_parameters()), MUON)
    take_steps(network, optimiser, 1)
    with_momentum = {
        name for name, value in network.named_parameters() if "momentum_buffer" in optimiser.state[value]
    }
    assert with_momentum == {"transformer_blocks.0.weight", "transformer_blocks.1.weight"}
    others = {name for name, value in network.named_parameters() if "exp_avg" in optimiser.state[value]}
    assert others == {name for name, _ in network.named_parameters()} - with_momentum


def test_a_step_of_muon_evens_directions_out_and_is_as_long_as_one_of_adamw() -> None:
    network = small_network()
    weight = network.get_parameter("transformer_blocks.0.weight")
    before = weight.detach().clone()
    take_steps(network, make_optimiser(dict(network.named_parameters()), MUON), 1)
    step = weight.detach() - before
    # Newton-Schulz stops early, so that the weakest directions stay behind; the gradient's are far weaker.
    assert weight.grad is not None
    spread_of_step, spread_of_gradient = (
        float(values[0] / values[-2]) for values in map(torch.linalg.svdvals, (step, weight.grad))
    )
    assert spread_of_step < 2.5
    assert spread_of_gradient > 5 * spread_of_step
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * MUON.learning_rate, rel=0.15)


def test_a_rate_set_on_the_groups_reaches_both() -> None:
    network = small_network()
    optimiser = make_optimiser(dict(network.named_parameters()), MUON)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    take_steps(network, optimiser, 2)
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name]), name


def test_going_on_gives_the_same_bits() -> None:
    whole = small_network()
    take_steps(whole, make_optimiser(dict(whole.named_parameters()), MUON), 6)

    first = small_network()
    parameters = dict(first.named_parameters())
    optimiser = make_optimiser(parameters, MUON)
    take_steps(first, optimiser, 3)
    saved = pack(parameters, Averages(parameters, 0.0), parameters, optimiser)

    second = small_network()
    parameters = dict(second.named_parameters())
    optimiser = make_optimiser(parameters, MUON)
    weights = unpack(saved, Averages(parameters, 0.0), parameters, optimiser)
    second.load_state_dict({name: weights[name] for name in parameters})
    take_steps(second, optimiser, 3)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_convolution_is_a_matrix_to_muon() -> None:
    torch.manual_seed(0)
    convolution = nn.Parameter(torch.randn(8, 2, 3, 3))
    matrix = nn.Parameter(convolution.detach().flatten(1).clone())
    optimisers = []
    for weight in (convolution, matrix):
        bias = nn.Parameter(torch.zeros(8))
        adamw = torch.optim.AdamW([bias])
        optimisers.append(MuonAndAdamW([weight], adamw, learning_rate=1e-2, weight_decay=0.1))
    for step in range(3):
        gradient = torch.randn(8, 18, generator=torch.Generator().manual_seed(step))
        for weight, optimiser in zip((convolution, matrix), optimisers, strict=True):
            optimiser.zero_grad()
            assert weight.grad is None
            weight.grad = gradient.view_as(weight).clone()
            optimiser.step()
    assert torch.equal(convolution.flatten(1), matrix)
    momentum = [
        optimiser.state[weight]["momentum_buffer"]
        for weight, optimiser in zip((convolution, matrix), optimisers, strict=True)
    ]
    assert momentum[0].shape == convolution.shape
    assert torch.equal(momentum[0].flatten(1), momentum[1])
