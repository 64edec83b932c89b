"""Q/DQ nodes in a traced denoiser: computed as the formats say, shared where inputs are, filled lazily."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.errors import InputError
from proteus_deploy.export.activation_recorder import ActivationRecorder
from proteus_deploy.export.activation_statistics import ActivationStatistics
from proteus_deploy.export.input_scaling import InputScaling, scale_inputs
from proteus_deploy.export.onnx_graph import traced_model, write_model
from proteus_deploy.export.qdq import Quantisation
from proteus_deploy.export.quantize import GraphPlan, coarsest, plan_module
from proteus_deploy.export.recipe import Recipe, ready_recipes
from proteus_deploy.export.weight_quantizers import LARGEST_CODE, quantise_weight
from proteus_deploy.model.networks import Network
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.onnxruntime_backend import OnnxRuntimeGraph, open_session
from proteus_deploy.stage_table import build_stage_table
from proteus_deploy.stages import Graph, StageTable, sample_inputs
from proteus_deploy.testing import TOLERANCES, assert_close

GROUPS = (0, 500)
MIDDLE = "transformer_blocks.1"


@dataclass(frozen=True)
class Traced:
    """A denoiser of three blocks, of which the middle one is quantised, traced once."""

    graph: Graph
    table: StageTable
    network: Network
    module: nn.Module
    model: Any
    statistics: ActivationStatistics
    inputs: dict[str, Tensor]

    def plan(self, recipe: Recipe) -> GraphPlan:
        return plan_module(recipe, "denoiser", self.network.module)

    def write(self, recipe: Recipe, file: Path, **changes: Any) -> Any:
        """An ONNX file of the recipe, checked. changes: of the network or the statistics."""
        quantisation = Quantisation(self.plan(recipe), changes.pop("statistics", self.statistics))
        network = replace(self.network, **changes)
        write_model(self.model.clone(), network, file, dtype=torch.float32, quantisation=quantisation)
        onnx.checker.check_model(str(file), full_check=True)
        return onnx.load(str(file))

    def run(self, recipe: Recipe, file: Path, **changes: Any) -> Tensor:
        self.write(recipe, file, **changes)
        session = open_session(file, formats=self.plan(recipe).formats)
        return OnnxRuntimeGraph(self.graph, session)(**self.inputs)["velocity"]

    def want(self) -> Tensor:
        with torch.inference_mode():
            return self.module(*[self.inputs[spec.name] for spec in self.graph.inputs])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def traced(parity: Path, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return make_traced(Checkpoint.open(shortened(parity, tmp_path_factory.mktemp("three"))))


def shortened(parity: Path, folder: Path) -> Path:
    """The parity checkpoint with three blocks instead of four."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(parity / "checkpoint", folder, dirs_exist_ok=True)
    config = folder / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 3}))
    (weights,) = (folder / "transformer").glob("*.safetensors")
    kept = {k: v for k, v in load_file(weights).items() if not k.startswith("transformer_blocks.3.")}
    save_file(kept, weights)
    return folder


def make_traced(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Traced:
    table = build_stage_table(checkpoint)
    factory, graph = NetworkFactory(checkpoint, folded=True), table.graph("denoiser")
    module = factory("denoiser").materialise(torch.float32)
    recorder = ActivationRecorder(GROUPS)
    with torch.inference_mode(), recorder.watch({"denoiser": module}):
        for index, start in enumerate(GROUPS):
            inputs = sample_inputs(graph, table.sizes("opt"), seed=index)
            inputs["timestep"][:] = start + 100
            module(*[inputs[spec.name] for spec in graph.inputs])
    statistics = ActivationStatistics(recorder.layers(), GROUPS, {})
    network = factory("denoiser")
    model = traced_model(graph, table, network, dtype=dtype)
    return Traced(graph, table, network, module, model, statistics, inputs)


def recipe_of(*rules: dict[str, Any], **fields: Any) -> Recipe:
    graphs = {"denoiser": {"rules": list(rules), **fields}}
    return Recipe.from_json({"schema_version": 1, "name": "mine", "graphs": graphs})


INT8 = {"layers": "transformer_blocks.*", "weight": "int8", "activation": "int8"}


# What is computed


@pytest.mark.parametrize("name", [name for name in ready_recipes() if name != "nvfp4-weight"])
def test_recipes_run_in_onnxruntime(traced: Traced, tmp_path: Path, name: str) -> None:
    """Near the unquantised network, and as near to the formats' own arithmetic as float32 sums are."""
    recipe = Recipe.load(name)
    got = traced.run(recipe, tmp_path / "graph.onnx")
    assert_close(
        name, got, traced.want(), TOLERANCES["quantised", "denoiser", coarsest(traced.plan(recipe).formats)]
    )
    if not recipe.quantises_attention:
        bound = TOLERANCES["quantised", "same codes", "fp32"]
        assert_close(f"{name} in torch", got, emulated(traced, recipe), bound)


@pytest.mark.parametrize("name", ["nvfp4-weight", "fp8", "int4-weight"])
def test_recipes_run_in_openvino(traced: Traced, tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino")
    from proteus_deploy.runtime.openvino_backend import OpenVinoGraph, openvino_core

    recipe = Recipe.load(name)
    traced.write(recipe, tmp_path / "graph.onnx")
    core = openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(core.read_model(str(tmp_path / "graph.onnx")), "CPU", settings)
    got = OpenVinoGraph(traced.graph, compiled)(**traced.inputs)["velocity"]
    bound = TOLERANCES["quantised", "same codes", "fp32"]
    assert_close(f"{name} in torch", got, emulated(traced, recipe), bound)


def emulated(traced: Traced, recipe: Recipe) -> Tensor:
    """The same codes, computed by the float32 network: weights and inputs are replaced by what codes say."""
    plan = traced.plan(recipe)
    linears = dict(traced.module.named_modules())
    originals = {layer.name: linears[layer.name].weight for layer in plan.quantised}
    scalings = scale_inputs(plan, lambda name: originals[name].detach(), traced.statistics)
    hooks = []
    try:
        for layer in plan.quantised:
            scaling, rule, linear = scalings[layer.leader], layer.rule, linears[layer.name]
            assert rule is not None
            assert rule.weight != "none"
            multiplier = torch.ones(linear.in_features) if scaling.multiplier is None else scaling.multiplier
            weight = originals[layer.name].detach() / multiplier
            codes = quantise_weight(weight, rule.weight, rule.granularity, rule.block_size)
            linear.weight = nn.Parameter(codes.dequantise(), requires_grad=False)
            hooks.append(
                linear.register_forward_pre_hook(fake_quantise(scaling, multiplier, rule.activation))
            )
        return traced.want()
    finally:
        for hook in hooks:
            hook.remove()
        for name, original in originals.items():
            linears[name].weight = original


def fake_quantise(scaling: InputScaling, multiplier: Tensor, kind: str) -> Callable[..., Any]:
    def before(_module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        x = arguments[0] * multiplier
        if scaling.amax is None:
            return (x,)
        step = torch.tensor(scaling.amax / LARGEST_CODE[kind])
        if kind == "int8":
            return ((x / step).round().clamp(-128, 127) * step,)
        return ((x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step,)

    return before


def test_factors_of_one_change_nothing(traced: Traced, tmp_path: Path) -> None:
    """With equal ranges in all groups, timestep_groups computes the plain form, bit for bit."""
    equal = {
        name: replace(layer, amax=layer.amax.amax(0).expand_as(layer.amax).contiguous())
        for name, layer in traced.statistics.layers.items()
    }
    statistics = replace(traced.statistics, layers=equal)
    plain = traced.run(recipe_of(INT8), tmp_path / "plain.onnx", statistics=statistics)
    grouped_recipe = recipe_of({**INT8, "timestep_groups": True})
    grouped = traced.run(grouped_recipe, tmp_path / "grouped.onnx", statistics=statistics)
    assert torch.equal(plain, grouped)


def test_groups_give_small_timesteps_their_own_range(traced: Traced, tmp_path: Path) -> None:
    """Ranges that one group needs alone don't coarsen the codes of the other."""
    wide = {}
    for name, layer in traced.statistics.layers.items():
        amax = layer.amax.clone()
        if amax.shape[0] == 2:
            amax[0] *= 50
        wide[name] = replace(layer, amax=amax)
    statistics = replace(traced.statistics, layers=wide)
    want = traced.want()  # the inputs' timestep is in the second group
    plain = traced.run(recipe_of(INT8), tmp_path / "plain.onnx", statistics=statistics)
    grouped_recipe = recipe_of({**INT8, "timestep_groups": True})
    grouped = traced.run(grouped_recipe, tmp_path / "grouped.onnx", statistics=statistics)
    assert float((grouped - want).norm()) < 0.2 * float((plain - want).norm())


def test_a_group_without_rows_has_the_widest_range(traced: Traced) -> None:
    plan = traced.plan(recipe_of({**INT8, "timestep_groups": True}))
    key = f"denoiser/{MIDDLE}.ff.net.2"
    layer = traced.statistics.layers[key]
    unseen = replace(layer, amax=layer.amax * torch.tensor([[1.0], [0.0]]))
    statistics = replace(traced.statistics, layers={**traced.statistics.layers, key: unseen})
    scaling = scale_inputs(plan, lambda _: pytest.fail("no weight is needed"), statistics)
    factors = scaling[f"{MIDDLE}.ff.net.2"].factors
    assert factors is not None
    assert factors.tolist() == [1.0, 1.0]


def test_smoothing_is_by_powers_of_two_and_shared(traced: Traced) -> None:
    plan = traced.plan(Recipe.load("int8"))
    weights = {name: value.detach() for name, value in traced.module.named_parameters()}
    scalings = scale_inputs(plan, lambda name: weights[f"{name}.weight"], traced.statistics)
    assert f"{MIDDLE}.attn1.to_k" not in scalings
    multiplier = scalings[f"{MIDDLE}.attn1.to_q"].multiplier
    assert multiplier is not None
    assert torch.equal(torch.frexp(multiplier).mantissa, torch.full_like(multiplier, 0.5))
    # alpha 0.5: both sides get near one another, up to the rounding to a power of two
    x = traced.statistics.amax(f"denoiser/{MIDDLE}.attn1.to_q") * multiplier
    columns = torch.stack([weights[f"{MIDDLE}.attn1.{name}.weight"] for name in ("to_q", "to_k", "to_v")])
    w = columns.abs().amax((0, 1)) / multiplier
    assert float((x / w).log2().abs().max()) <= 1.01


# What is written


def test_queries_keys_and_values_share_their_codes(traced: Traced, tmp_path: Path) -> None:
    model = traced.write(Recipe.load("int8"), tmp_path / "graph.onnx")
    nodes = model.graph.node
    quantised = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(quantised) == 4, "q, k and v; out; two of the feed-forward"
    dequantised = next(n for n in nodes if n.name == f"{MIDDLE}.attn1.to_q.input.dequantized")
    users = [node for node in nodes if dequantised.output[0] in node.input]
    assert [node.op_type for node in users] == ["MatMul"] * 3
    assert {node.domain for node in nodes} == {""}


def test_quantised_weights_replace_the_others(traced: Traced, tmp_path: Path) -> None:
    recipe = Recipe.load("int8")
    model = traced.write(recipe, tmp_path / "graph.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = tensors[f"{MIDDLE}.ff.net.0.proj.weight.codes"]
    assert list(codes.dims) == [96, 384], "inputs first"
    assert codes.data_type == onnx.TensorProto.INT8
    for layer in traced.plan(recipe).layers:
        name = f"{layer.name}.weight"
        assert (name in tensors) == (layer.rule is None), name
        assert (f"{name}.codes" in tensors) == (layer.rule is not None), name


def test_folded_weights_are_read_dequantised(traced: Traced, tmp_path: Path) -> None:
    """Nothing multiplies them with activations of their own, and each use sees the same codes."""
    model = traced.write(Recipe.load("int8-weight"), tmp_path / "graph.onnx")
    for name in ("to_q", "to_out"):
        layer = f"perceiver_cross_attention.0.{name}"
        turned = next(node for node in model.graph.node if node.name == f"{layer}.turned")
        assert list(turned.input) == [f"{layer}.weight.dequantized"]
        users = [node for node in model.graph.node if turned.output[0] in node.input]
        assert users
        assert all(node.op_type in ("Reshape", "MatMul", "Transpose") for node in users), users


@pytest.mark.parametrize(
    ("name", "opset", "kind"),
    [("fp8", 20, "FLOAT8E4M3FN"), ("int4-weight", 21, "INT4"), ("nvfp4-weight", 23, "FLOAT4E2M1")],
)
def test_types_and_opsets(traced: Traced, tmp_path: Path, name: str, opset: int, kind: str) -> None:
    model = traced.write(Recipe.load(name), tmp_path / "graph.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    codes = next(t for t in model.graph.initializer if t.name == f"{MIDDLE}.attn1.to_q.weight.codes")
    assert codes.data_type == getattr(onnx.TensorProto, kind)
    expected = 96 * 96 if kind == "FLOAT8E4M3FN" else 96 * 48
    assert len(codes.raw_data) == expected


def test_same_bytes_twice(traced: Traced, tmp_path: Path) -> None:
    for name in ("int8", "int4-weight"):
        for file in ("one.onnx", "two.onnx"):
            traced.write(Recipe.load(name), tmp_path / file)
        assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_modulation_of_two_axes(traced: Traced, tmp_path: Path) -> None:
    """A Gemm is taken apart: product, factor of the group, bias."""
    recipe = recipe_of({**INT8, "layers": "*.norm1.linear", "timestep_groups": True}, keep=[])
    got = traced.run(recipe, tmp_path / "graph.onnx")
    assert_close("modulation", got, traced.want(), TOLERANCES["quantised", "denoiser", "int8"])


class CountingWeights:
    """Weights that know how many of their tensors are alive."""

    def __init__(self, source: Any) -> None:
        self.source = "counted weights"
        self._store = source
        self._alive: list[weakref.ref[Any]] = []
        self.most = 0

    def keys(self) -> Iterator[str]:
        return iter(self._store.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return self._store.shape(key)  # type: ignore[no-any-return]

    def tensor(self, key: str) -> Tensor:
        memory = self._store.tensor(key).float().numpy().copy()
        self._alive = [*(ref for ref in self._alive if ref() is not None), weakref.ref(memory)]
        self.most = max(self.most, len(self._alive))
        return torch.from_numpy(memory)


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["embedded", "external"])
def test_weights_are_read_one_at_a_time(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("proteus_deploy.export.onnx_graph.EMBED_LIMIT_BYTES", limit)
    for name in ("int8", "int4-weight"):
        weights = CountingWeights(traced.network.source)
        traced.write(Recipe.load(name), tmp_path / f"{name}.onnx", source=weights)
        assert weights.most <= 2, "the one being read and at most the one being written"


# What is refused


def test_statistics_of_another_network(traced: Traced, tmp_path: Path) -> None:
    layers = {k: v for k, v in traced.statistics.layers.items() if not k.endswith(f"{MIDDLE}.attn1.to_q")}
    with pytest.raises(InputError, match=r"say nothing of 'denoiser/transformer_blocks\.1\.attn1\.to_q'"):
        traced.write(
            Recipe.load("int8"),
            tmp_path / "graph.onnx",
            statistics=replace(traced.statistics, layers=layers),
        )
    key = f"denoiser/{MIDDLE}.attn1.to_q"
    narrow = replace(traced.statistics.layers[key], amax=torch.ones(2, 5))
    with pytest.raises(InputError, match="5 channels, the layer has 96 inputs"):
        traced.write(
            Recipe.load("int8"),
            tmp_path / "graph.onnx",
            statistics=replace(traced.statistics, layers={**traced.statistics.layers, key: narrow}),
        )
    assert not (tmp_path / "graph.onnx").exists()


def test_weights_that_meet_no_activation(traced: Traced, tmp_path: Path) -> None:
    plan = traced.plan(Recipe.load("int8-weight"))
    broken = replace(plan.quantised[0], name="norm_final")
    quantisation = Quantisation(replace(plan, layers=(broken,)))
    with pytest.raises(InputError, match="does not multiply activations with"):
        write_model(
            traced.model.clone(),
            traced.network,
            tmp_path / "graph.onnx",
            dtype=torch.float32,
            quantisation=quantisation,
        )
