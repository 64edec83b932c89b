"""Frozen weights: constants of what was compiled, which later changes don't reach, and the same result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from proteus_deploy import BackendError, Pipeline
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.runtime.compiled import CompiledNetwork
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close, relative_error


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


@pytest.mark.parametrize("frozen", [True, False])
def test_only_frozen_weights_are_constants(frozen: bool) -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    network, x = CompiledNetwork("layer", layer, frozen=frozen), torch.ones(4, 8)
    with torch.inference_mode():
        before = network({"N": 4}, x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert torch.equal(network({"N": 4}, x), before) is frozen
        assert not torch._inductor.config.freezing


@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_and_plain_networks_do_not_share_code(frozen_first: bool) -> None:
    """PyTorch looks up compiled code by the class; the weights' owner must not matter."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    networks = {frozen: CompiledNetwork("layer", layer, frozen=frozen) for frozen in (True, False)}
    x = torch.ones(4, 8)
    with torch.inference_mode():
        before = {frozen: networks[frozen]({"N": 4}, x) for frozen in (frozen_first, not frozen_first)}
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        for frozen, network in networks.items():
            assert torch.equal(network({"N": 4}, x), before[frozen]) is frozen


def test_gradients_would_leave_weights_unfrozen() -> None:
    network = CompiledNetwork("layer", nn.Linear(8, 8), frozen=True)
    with pytest.raises(BackendError, match="layer is frozen, and gradients are on"):
        network({"N": 4}, torch.ones(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["denoiser", "vae_decoder_first_2"])
def test_what_is_frozen_is_the_same(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    frozen = EagerBackend(checkpoint, dtype=dtype, compiled=True, frozen=True)
    eager = EagerBackend(checkpoint)
    assert frozen.name == "compiled-frozen"
    graph = eager.table.graph(name)
    inputs = sample_inputs(graph, eager.table.sizes("opt"))
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    cast = {name: value.to(kinds[graph.input(name).dtype]) for name, value in inputs.items()}
    output = graph.outputs[0].name
    got, want = frozen.runner(name)(**cast)[output], eager.runner(name)(**inputs)[output]
    if dtype == torch.float32:
        assert_close(output, got, want, TOLERANCES["bundle", "graph", "fp32"])
        return
    plain = EagerBackend(checkpoint, dtype=dtype).runner(name)(**cast)[output]
    assert relative_error(got, want) < 1.5 * relative_error(plain, want)


def test_the_text_encoder_has_one_copy_of_its_weights(checkpoint: Checkpoint) -> None:
    """A changed weight is seen: it was not made a constant."""
    backend = EagerBackend(checkpoint, compiled=True, frozen=True)
    runner = backend.runner("text_encoder")
    inputs = sample_inputs(runner.graph, {"B": 1, "N": 5})
    before = runner(**inputs)["text"]
    with torch.no_grad():
        for parameter in runner.module.parameters():
            parameter.mul_(2)
    assert not torch.equal(runner(**inputs)["text"], before)


def test_it_is_for_what_is_compiled_on_a_cpu(checkpoint: Checkpoint, parity: Path) -> None:
    with pytest.raises(BackendError, match="here compiled is False and the device cpu"):
        EagerBackend(checkpoint, frozen=True)
    with pytest.raises(BackendError, match="here compiled is False"):
        Pipeline.from_checkpoint(parity / "checkpoint", frozen=True)


def test_stored_codes_would_become_whole_weights(checkpoint: Checkpoint) -> None:
    from proteus_deploy.export.quantised_export import prepare_quantisation
    from proteus_deploy.export.recipe import Recipe
    from proteus_deploy.export.torch_quantizer import TorchQuantizer
    from proteus_deploy.stage_table import build_stage_table

    recipe = Recipe.load("int8-weight")
    found = prepare_quantisation(recipe, checkpoint, build_stage_table(checkpoint), None)
    with pytest.raises(BackendError, match="frozen would turn the stored codes of 'int8-weight'"):
        EagerBackend(
            checkpoint, compiled=True, frozen=True, quantize=TorchQuantizer(recipe, found.statistics)
        )
