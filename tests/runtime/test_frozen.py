"""Frozen weights: which networks the compiler is told to freeze, and that the result is the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proteus_deploy import BackendError, InputError, Pipeline
from proteus_deploy.benchmarks.candidates import Opener, parse_candidate
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.runtime.compiled import CompiledNetwork
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.serving.messages import PipelineChoice
from proteus_deploy.serving.worker_pipeline import open_pipeline
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close, relative_error


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def frozen_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each graph that inductor freezes. (Whether a changed weight is seen depends on the CPU.)"""
    from torch._inductor import compile_fx

    graphs: list[Any] = []
    real = compile_fx.fw_compiler_freezing

    def counted(graph: Any, *rest: Any, **named: Any) -> Any:
        graphs.append(graph)
        return real(graph, *rest, **named)

    monkeypatch.setattr(compile_fx, "fw_compiler_freezing", counted)
    return graphs


@pytest.fixture
def checkpoint(parity: Path) -> Checkpoint:
    return Checkpoint.open(parity / "checkpoint")


@pytest.mark.parametrize("environment", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_argument_chooses(frozen: bool, environment: bool, frozen_graphs: list[Any]) -> None:
    """TORCHINDUCTOR_FREEZING=1 sets the configuration's value for a process."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    with torch._inductor.config.patch(freezing=environment), torch.inference_mode():
        CompiledNetwork("layer", layer, frozen=frozen)({"N": 4}, torch.ones(4, 8))
        assert torch._inductor.config.freezing is environment
    assert len(frozen_graphs) == frozen


@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_and_plain_networks_do_not_share_code(frozen_first: bool, frozen_graphs: list[Any]) -> None:
    """PyTorch looks up compiled code by the class."""
    layer, counts = nn.Linear(8, 8).requires_grad_(False), []
    with torch.inference_mode():
        for frozen in (frozen_first, not frozen_first):
            CompiledNetwork("layer", layer, frozen=frozen)({"N": 4}, torch.ones(4, 8))
            counts.append(len(frozen_graphs))
    assert counts == ([1, 1] if frozen_first else [0, 1])


def test_two_frozen_networks_keep_their_own_weights() -> None:
    layers = [nn.Linear(8, 8).requires_grad_(False) for _ in range(2)]
    x = torch.ones(4, 8)
    with torch.inference_mode():
        for layer in layers:
            got = CompiledNetwork("layer", layer, frozen=True)({"N": 4}, x)
            assert_close("layer", got, layer(x), TOLERANCES["bundle", "graph", "fp32"])


def test_calls_leave_nothing_in_the_context() -> None:
    """A server makes millions of them in one thread."""
    network, x = CompiledNetwork("layer", nn.Linear(8, 8).requires_grad_(False)), torch.ones(4, 8)
    with torch.inference_mode():
        network({"N": 4}, x)
        before = len(copy_context())
        for _ in range(10):
            network({"N": 4}, x)
    assert len(copy_context()) == before


def test_gradients_would_leave_weights_unfrozen() -> None:
    network = CompiledNetwork("layer", nn.Linear(8, 8), frozen=True)
    with pytest.raises(BackendError, match="layer is frozen, and gradients are on"):
        network({"N": 4}, torch.ones(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["denoiser", "vae_decoder_first_2"])
def test_what_is_frozen_is_the_same(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, frozen_graphs: list[Any]
) -> None:
    frozen = EagerBackend(checkpoint, dtype=dtype, compiled=True, frozen=True)
    eager = EagerBackend(checkpoint)
    assert frozen.name == "compiled-frozen"
    graph = eager.table.graph(name)
    inputs = sample_inputs(graph, eager.table.sizes("opt"))
    kinds = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    cast = {name: value.to(kinds[graph.input(name).dtype]) for name, value in inputs.items()}
    output = graph.outputs[0].name
    got, want = frozen.runner(name)(**cast)[output], eager.runner(name)(**inputs)[output]
    assert len(frozen_graphs) == 1
    if dtype == torch.float32:
        assert_close(output, got, want, TOLERANCES["bundle", "graph", "fp32"])
        return
    plain = EagerBackend(checkpoint, dtype=dtype).runner(name)(**cast)[output]
    assert relative_error(got, want) < 1.5 * relative_error(plain, want)


def test_the_text_encoder_has_one_copy_of_its_weights(
    checkpoint: Checkpoint, frozen_graphs: list[Any]
) -> None:
    runner = EagerBackend(checkpoint, compiled=True, frozen=True).runner("text_encoder")
    runner(**sample_inputs(runner.graph, {"B": 1, "N": 5}))
    assert frozen_graphs == []


def test_it_reaches_the_backend_of_a_pipeline_and_of_a_worker(parity: Path) -> None:
    choice = PipelineChoice("checkpoint", str(parity / "checkpoint"), backend="compiled", frozen=True)
    with (
        Pipeline.from_checkpoint(parity / "checkpoint", compiled=True, frozen=True) as own,
        open_pipeline(choice) as served,
    ):
        for pipeline in (own, served):
            assert isinstance(pipeline.backend, EagerBackend)
            assert pipeline.backend.frozen
            assert pipeline.backend.name == "compiled-frozen"


def test_attention_reaches_the_backend_of_a_worker(parity: Path) -> None:
    choice = PipelineChoice("checkpoint", str(parity / "checkpoint"), attention="none")
    with pytest.raises(BackendError, match="attention 'none' is unknown"):
        open_pipeline(choice)


def test_what_is_released_in_each_request_is_not_frozen(parity: Path) -> None:
    with pytest.raises(InputError, match="low_memory releases networks within each request"):
        Pipeline.from_checkpoint(parity / "checkpoint", compiled=True, frozen=True, low_memory=True)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or shutil.which("g++") is None,
    reason="the attention of compiled-cpu needs AVX512-BF16 and g++",
)
def test_a_candidate_for_cpus_is_frozen_without_a_recipe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    opener = Opener(checkpoint, None, tmp_path)
    assert opener(parse_candidate("exact:compiled-cpu:bf16")).name == "compiled-attention-cpu-bf16-frozen"
    recipe = opener(parse_candidate("exact:compiled-cpu:bf16+int8-weight"))
    assert recipe.name == "compiled-attention-cpu-bf16-int8-weight"
    assert opener(parse_candidate("exact:compiled:fp32")).name == "compiled"


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
