"""Recipes in PyTorch: the denoiser against its ONNX graph, compiled, refused, and in a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import BackendError, InputError
from proteus_deploy.export.activation_recorder import ActivationRecorder
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.onnx_graph import traced_model, write_model
from proteus_deploy.export.qdq import Quantisation
from proteus_deploy.export.quantize import plan_module
from proteus_deploy.export.quantized_linear import (
    Int8Linear,
    QuantizedLinear,
    WeightOnlyLinear,
)
from proteus_deploy.export.recipe import Recipe, ready_recipes
from proteus_deploy.export.torch_quantizer import TorchQuantizer
from proteus_deploy.model.networks import Network
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.request import GenerateRequest
from proteus_deploy.runtime.compiled import CompiledNetwork
from proteus_deploy.runtime.eager import EagerBackend
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph, open_session
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.stages import sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close

GROUPS = (0, 500)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """The parity checkpoint, statistics of its denoiser, and inputs to it."""

    checkpoint: Checkpoint
    statistics: ActivationStatistics
    inputs: dict[str, Tensor]

    def module(self, quantizer: TorchQuantizer | None, dtype: torch.dtype = torch.float32) -> nn.Module:
        network = NetworkFactory(self.checkpoint, folded=True)("denoiser")
        if quantizer is not None:
            quantizer("denoiser", network, dtype, CPU)
        return network.materialise(dtype)

    @torch.inference_mode()
    def run(self, module: nn.Module) -> Tensor:
        return module(*self.ordered())  # type: ignore[no-any-return]

    def ordered(self) -> list[Tensor]:
        graph = build_stage_table(self.checkpoint).graph("denoiser")
        return [self.inputs[spec.name] for spec in graph.inputs]


@pytest.fixture(scope="module")
def sample(parity: Path) -> Sample:
    checkpoint = Checkpoint.open(parity / "checkpoint")
    table = build_stage_table(checkpoint)
    graph = table.graph("denoiser")
    module = NetworkFactory(checkpoint, folded=True)("denoiser").materialise(torch.float32)
    recorder = ActivationRecorder(GROUPS)
    with torch.no_grad(), recorder.watch({"denoiser": module}):
        for index, start in enumerate(GROUPS):
            inputs = sample_inputs(graph, table.sizes("opt"), seed=index)
            inputs["timestep"][:] = start + 100
            module(*[inputs[spec.name] for spec in graph.inputs])
    return Sample(checkpoint, ActivationStatistics(recorder.layers(), GROUPS, {}), inputs)


@pytest.fixture(scope="module")
def traced(sample: Sample) -> tuple[Any, Network]:
    """The denoiser as an ONNX model, not quantised and without weights, and the network behind it."""
    table = build_stage_table(sample.checkpoint)
    network = NetworkFactory(sample.checkpoint, folded=True)("denoiser")
    return traced_model(table.graph("denoiser"), table, network, dtype=torch.float32), network


def recipe_of(*rules: dict[str, Any], **fields: Any) -> Recipe:
    graphs = {"denoiser": {"rules": list(rules), **fields}}
    return Recipe.from_json({"schema_version": 1, "name": "mine", "graphs": graphs})


# The network


@pytest.mark.parametrize("name", [name for name in ready_recipes() if name != "nvfp4-weight"])
def test_the_denoiser_equals_its_onnx_graph(
    sample: Sample, traced: tuple[Any, Network], name: str, tmp_path: Path
) -> None:
    """ONNX Runtime has no E2M1; the other recipes hold the same codes on both paths."""
    recipe = Recipe.load(name)
    module = sample.module(TorchQuantizer(recipe, sample.statistics, simulate="fp8" in name))
    graph = build_stage_table(sample.checkpoint).graph("denoiser")
    model, network = traced
    plan = plan_module(recipe, "denoiser", network.module)
    quantisation = Quantisation(plan, sample.statistics)
    file = tmp_path / "graph.onnx"
    write_model(model.clone(), network, file, dtype=torch.float32, quantisation=quantisation)
    session = open_session(file, formats=plan.formats)
    expected = OnnxRuntimeGraph(graph, session)(**sample.inputs)["velocity"]
    exact = sample.run(sample.module(None))
    found = sample.run(module)
    assert_close(name, found, expected, TOLERANCES["quantised", "same codes", "fp32"])
    # And they are nearer to each other than to the network that isn't quantised.
    assert (found - expected).square().mean() < 0.1 * (found - exact).square().mean()


def test_nvfp4_weights(sample: Sample) -> None:
    found = sample.run(sample.module(TorchQuantizer(Recipe.load("nvfp4-weight"), sample.statistics)))
    assert_close(
        "nvfp4-weight",
        found,
        sample.run(sample.module(None)),
        TOLERANCES["quantised", "denoiser", "nvfp4"],
    )


def test_only_what_the_recipe_names_is_replaced(sample: Sample) -> None:
    recipe = recipe_of(
        {"layers": "transformer_blocks.1.attn1.*", "weight": "int8", "activation": "int8"},
        {"layers": "transformer_blocks.2.ff.*", "weight": "int8"},
    )
    module = sample.module(TorchQuantizer(recipe, sample.statistics))
    replaced = {
        name: type(part) for name, part in module.named_modules() if isinstance(part, QuantizedLinear)
    }
    attention = {f"transformer_blocks.1.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = {f"transformer_blocks.2.ff.net.{name}" for name in ("0.proj", "2")}
    assert replaced == dict.fromkeys(attention, Int8Linear) | dict.fromkeys(feed_forward, WeightOnlyLinear)
    weights = {f"{name}.weight" for name in replaced}
    assert set(dict(sample.module(None).named_parameters())) - weights == set(dict(module.named_parameters()))


@pytest.mark.slow
def test_the_compiled_denoiser(sample: Sample) -> None:
    """One graph, nothing left uncompiled; timestep groups among it."""
    rule = {"layers": "transformer_blocks.2.*", "weight": "int8", "activation": "int8", "smooth": 0.5}
    others = {"layers": "transformer_blocks.1.attn1.*", "weight": "int4", "block_size": 32}
    recipe = recipe_of({**rule, "timestep_groups": True}, others)
    module = sample.module(TorchQuantizer(recipe, sample.statistics))
    with torch.inference_mode():
        found = CompiledNetwork("denoiser", module)({}, *sample.ordered())
    # Inductor rounds at other places, and a code that lies between two may be the other one.
    assert_close("compiled", found, sample.run(module), TOLERANCES["quantised", "same codes", "fp32"])


def test_timestep_groups_follow_the_timestep(sample: Sample) -> None:
    rule = {"layers": "transformer_blocks.*", "weight": "int8", "activation": "int8"}
    grouped = sample.module(TorchQuantizer(recipe_of({**rule, "timestep_groups": True}), sample.statistics))
    module = sample.module(TorchQuantizer(recipe_of(rule), sample.statistics))
    exact = sample.module(None)
    for timestep in (100, 600):
        sample.inputs["timestep"][:] = timestep
        want = sample.run(exact)
        errors = [(sample.run(one) - want).square().mean() for one in (grouped, module)]
        assert errors[0] <= 1.2 * errors[1]
        assert float(errors[0]) > 0
    sample.inputs["timestep"][:] = 600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(sample: Sample, dtype: torch.dtype) -> None:
    network = sample.module(TorchQuantizer(Recipe.load("int8"), sample.statistics), dtype)
    inputs = [x.to(dtype) if x.is_floating_point() and x.ndim > 2 else x for x in sample.ordered()]
    with torch.inference_mode():
        found = network(*inputs)
    assert found.dtype == dtype
    expected = sample.run(sample.module(None))
    assert_close("int8", found.float(), expected, TOLERANCES["quantised", "denoiser", "int8"])


# Refusals, and the pipeline


def test_what_a_device_can_not_multiply_is_refused(sample: Sample, parity: Path) -> None:
    for name, message in (
        (
            "fp8",
            r"denoiser/transformer_blocks\.\* multiplies fp8_e4m3 codes.*device is cpu; simulate",
        ),
        ("fp8-attention", "multiplies fp8_e4m3 codes"),
    ):
        with pytest.raises(BackendError, match=message):
            Pipeline.from_checkpoint(
                parity / "checkpoint", quantize=TorchQuantizer(Recipe.load(name), sample.statistics)
            )
    attention = recipe_of(attention=[{"layers": "transformer_blocks.*.attn1", "format": "fp8_e4m3"}])
    with pytest.raises(BackendError, match="no attention of fp8_e4m3 codes"):
        TorchQuantizer(attention, sample.statistics).check_runs_on(CPU)
    with pytest.raises(InputError, match="proteus-deploy calibrate"):
        TorchQuantizer(Recipe.load("int8"))
    quantizer = TorchQuantizer(Recipe.load("int8-weight"))
    with pytest.raises(BackendError, match="without weights_of"):
        EagerBackend(sample.checkpoint, quantize=quantizer, weights_of=EagerBackend(sample.checkpoint))


def test_a_pipeline_names_its_recipe(
    parity: Path, small_request: Callable[..., GenerateRequest], parity_pipeline: Pipeline
) -> None:
    quantizer = TorchQuantizer(Recipe.load("int8-weight"))
    with Pipeline.from_checkpoint(parity / "checkpoint", quantize=quantizer) as pipeline:
        video = pipeline.generate(small_request())
        again = pipeline.generate(small_request())
    assert video.metadata["backend"] == "eager-int8-weight"
    assert torch.equal(video.frames, again.frames)
    exact = parity_pipeline.generate(small_request()).frames
    assert not torch.equal(video.frames, exact)
    assert (video.frames - exact).abs().mean() < 0.02
    assert quantizer.hash != TorchQuantizer(Recipe.load("int8-weight"), simulate=True).hash
