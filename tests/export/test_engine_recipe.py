"""Products beside the recipe: every verdict, and Q/DQ pairs that are taken out behind the report's back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.checkpoint import Checkpoint
from proteus_deploy.cli.main import main
from proteus_deploy.errors import InputError
from proteus_deploy.export.build import check_recipe_gate
from proteus_deploy.export.engine_layers import read_layers
from proteus_deploy.export.engine_recipe import (
    AS_ASKED,
    EXPLAINED,
    HIGHER,
    NOT_ASKED,
    add_recipe,
    judge,
)
from proteus_deploy.export.engine_report import failures, report_network
from proteus_deploy.export.onnx_graph import export_graph
from proteus_deploy.export.qdq import Quantisation
from proteus_deploy.export.quantised_export import QuantisedExport, made_up_statistics
from proteus_deploy.export.quantize import plan_module
from proteus_deploy.export.recipe import Recipe
from proteus_deploy.network_factory import NetworkFactory
from proteus_deploy.runtime.tensorrt_api import TensorRT

_COMPUTED = ("files", "hash", "schema_version", "kind")  # of a manifest
GATE = "unexplained-high-precision"
RECIPE = Recipe.from_json(
    {
        "schema_version": 1,
        "name": "made",
        "graphs": {
            "denoiser": {
                "keep": [{"layers": "face.*", "reason": "the likeness"}],
                "rules": [{"layers": "*.a", "weight": "int8", "activation": "int8"}],
            }
        },
    }
)


def _product(weight: str, *operands: str, operator: str = "matrix_multiply", **fields: Any) -> dict[str, Any]:
    row = {"name": f"node {weight}", "operator": operator, "flops": 10, "weight": weight, "taken": None}
    return {**row, "operands": operands, "near": (), **fields}


def _verdict(row: dict[str, Any], layers: dict[str, str], attention: dict[str, str] | None = None) -> Any:
    """(name, wanted, found, verdict, reason) of the first product."""
    report = {"flops": 20, "layers": [row, {**row, "operator": "softmax"}]}
    plan = {
        "layers": {name: {"precision": precision, "reason": "why"} for name, precision in layers.items()},
        "attention": {
            name: {"precision": precision, "reason": "why"} for name, precision in (attention or {}).items()
        },
    }
    first = judge(report, "denoiser", plan, RECIPE)[0]
    assert first.share == 0.5
    return first.name, first.wanted, first.found, first.verdict, first.reason


@pytest.mark.parametrize(
    ("operands", "wanted", "verdict"),
    [
        (("int8", "int8"), "int8 x int8", AS_ASKED),
        (("bf16", "int8"), "int8 x int8", HIGHER),
        (("int8", "bf16"), "int8 x int8", HIGHER),
        (("bf16", "bf16"), "int8 x int8", HIGHER),
        (("bf16", "int8"), "int8", AS_ASKED),
        (("int8", "int8"), "int8", NOT_ASKED),
        (("bf16", "fp4"), "nvfp4 in blocks of 16", AS_ASKED),
        (("bf16", "int8"), "int4 in blocks of 32", HIGHER),
        (("bf16", "int4"), "int8", NOT_ASKED),
        (("fp8", "fp8"), "int8 x int8", NOT_ASKED),
        (("fp8", "fp8"), "fp8_e4m3 x fp8_e4m3", AS_ASKED),
        (("bf16", "fp8"), "fp8_e4m3", AS_ASKED),
        (("bf16", "bf16"), "as exported", EXPLAINED),
        (("bf16", "int8"), "as exported", NOT_ASKED),
    ],
)
def test_linear_layers(operands: tuple[str, str], wanted: str, verdict: str) -> None:
    found = _verdict(_product("blocks.1.a.weight.codes", *operands), {"blocks.1.a": wanted})
    assert found[:4] == ("blocks.1.a", wanted, " x ".join(operands), verdict)
    assert "why" in found[4]


def test_what_is_no_linear_layer_is_explained_or_not() -> None:
    layers = {"blocks.1.a": "int8 x int8"}
    kept = _verdict(_product("face.0.norm.bias", "bf16", "bf16"), layers)
    assert kept == ("face.0.norm.bias", "", "bf16 x bf16", EXPLAINED, "the likeness")
    unknown = _verdict(_product("folded", "bf16", "bf16"), layers)
    assert unknown[3:] == (EXPLAINED, "its constant is no Linear layer's weight: no rule can name it")
    window = _verdict(_product("patch.weight", "bf16", "bf16", operator="convolution"), layers)
    assert window[3:] == (EXPLAINED, "a convolution: recipes name Linear layers")


@pytest.mark.parametrize(
    ("operands", "attention", "verdict", "reason"),
    [
        (("bf16", "bf16"), {}, EXPLAINED, "no rule for attention"),
        (("fp8", "fp8"), {}, NOT_ASKED, "no rule for attention"),
        (("fp8", "fp8"), {"blocks.1.attn1": "fp8_e4m3"}, AS_ASKED, "why"),
        (("fp8", "bf16"), {"blocks.1.attn1": "fp8_e4m3"}, HIGHER, "why"),
        (("bf16", "bf16"), {"blocks.1.attn1": "as exported"}, EXPLAINED, "why"),
        (("fp8", "fp8"), {"blocks.0.attn1": "fp8_e4m3"}, NOT_ASKED, "no rule for attention"),
    ],
)
def test_attention(operands: tuple[str, str], attention: dict[str, str], verdict: str, reason: str) -> None:
    near = ("blocks.1.attn1.to_q.weight.codes", "blocks.1.attn1.to_k.weight.codes")
    found = _verdict(_product("", *operands, near=near), {}, attention)
    assert found[0] == "blocks.1.attn1: node "
    assert found[3] == verdict
    assert reason in found[4]


def test_identity_attention_is_kept_by_its_own_name() -> None:
    """The video's tokens come from another layer; the reason is that of the attention."""
    near = ("blocks.0.a.weight", "face.0.to_q.weight")
    found = _verdict(_product("", "bf16", "bf16", near=near), {})
    assert (found[0], found[3], found[4]) == ("face.0: node ", EXPLAINED, "the likeness")


def test_an_engine_that_takes_more_bits_is_not_explained() -> None:
    row = _product("blocks.1.a.weight", "int8", "int8", taken="bf16")
    assert _verdict(row, {"blocks.1.a": "int8 x int8"})[2:4] == ("bf16 x bf16", HIGHER)
    weights = _product("blocks.1.a.weight", "bf16", "int8", taken="bf16")
    assert _verdict(weights, {"blocks.1.a": "int8"})[3] == AS_ASKED


def test_a_layer_without_a_product_is_noticed() -> None:
    report = {"flops": 1, "layers": [], "findings": []}
    plan = {
        "layers": {
            "blocks.1.a": {"precision": "int8", "reason": "rule"},
            "face.0": {"precision": "as exported", "reason": "kept"},
        },
        "attention": {"blocks.1.attn1": {"precision": "as exported", "reason": "no rule"}},
    }
    joined = add_recipe(report, "denoiser", plan, RECIPE)
    assert joined["recipe"]["counts"] == {AS_ASKED: 0, EXPLAINED: 0, HIGHER: 1, NOT_ASKED: 0}
    (finding,) = joined["findings"]
    assert finding["layers"] == ["blocks.1.a"]
    assert "no product reads a weight of its name" in finding["text"]
    assert failures(joined, [GATE]) == [f"{GATE}: {finding['text']}"]


def test_an_attention_without_a_product_is_noticed() -> None:
    attention = {
        name: {"precision": "fp8_e4m3", "reason": "rule"} for name in ("blocks.0.attn1", "blocks.1.attn1")
    }
    row = _product("", "fp8", "fp8", near=("blocks.0.attn1.to_q.weight.codes",))
    report = {"flops": 10, "layers": [row], "findings": []}
    joined = add_recipe(report, "denoiser", {"layers": {}, "attention": attention}, RECIPE)
    (finding,) = joined["findings"]
    assert finding["layers"] == ["blocks.1.attn1"]
    assert "no product reads its projections" in finding["text"]


def test_several_layers_are_told_with_the_words_of_one() -> None:
    layers = {name: {"precision": "int8", "reason": "rule"} for name in ("blocks.1.a", "blocks.2.a")}
    joined = add_recipe({"flops": 1, "layers": [], "findings": []}, "denoiser", {"layers": layers}, RECIPE)
    assert "of blocks.1.a the recipe asks for int8" in joined["findings"][0]["text"]


def test_graphs_that_the_recipe_leaves_alone_say_so() -> None:
    joined = add_recipe({"flops": 1, "layers": [], "findings": []}, "vae_encoder", None, RECIPE)
    assert joined["recipe"]["products"] is None
    assert joined["recipe"]["reason"] == "recipe 'made' leaves this graph as exported"
    assert joined["findings"] == []


@pytest.fixture(scope="module")
def int8_bundle(parity: Path, parity_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity checkpoint in float32, its denoiser alone in int8; statistics are made up."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    folder = shutil.copytree(parity_bundle, tmp_path_factory.mktemp("int8") / "bundle")
    whole, bundle = Recipe.load("int8"), Bundle.open(parity_bundle, hashes=False)
    recipe = Recipe(whole.name, whole.summary, {"denoiser": whole.graphs["denoiser"]})
    network = NetworkFactory(Checkpoint.open(parity / "checkpoint"), folded=True)("denoiser")
    plan = plan_module(recipe, "denoiser", network.module)
    statistics = made_up_statistics({"denoiser": plan})
    export_graph(
        bundle.table.graph("denoiser"),
        bundle.table,
        network,
        folder / "onnx" / "denoiser.onnx",
        dtype=torch.float32,
        quantisation=Quantisation(plan, statistics),
    )
    quantised = QuantisedExport(recipe, {"denoiser": plan}, (), statistics, made_up=True)
    manifest = dict(bundle.manifest) | {"quantization": quantised.to_json()}
    manifest["graphs"]["denoiser"]["quantization"] = plan.to_json()
    write_manifest(folder, {name: value for name, value in manifest.items() if name not in _COMPUTED})
    return folder


def _joined(bundle: Bundle, onnx_file: Path) -> dict[str, Any]:
    """The report of the denoiser, from the network as TensorRT parses it; nothing is built."""
    graph = bundle.table.graph("denoiser")
    api = TensorRT.load("tensorrt_rtx")
    _, network = api.new_network()
    parser = api.parse(network, onnx_file)
    shapes = {name: sizes["opt"] for name, sizes in bundle.table.profile(graph).items()}
    report = report_network(read_layers(network, api.module, shapes), bundle.dtype)
    del parser
    plan = bundle.manifest["graphs"]["denoiser"]["quantization"]
    return add_recipe(report, "denoiser", plan, Recipe.load("int8"))


def _without_input_codes(model: Any, layer: str) -> None:
    """The layer reads its input as it was before the Q/DQ pair."""
    codes = next(node for node in model.graph.node if node.name == f"{layer}.input.codes")
    after = f"{layer}.input.dequantized"
    weight = f"{layer}.weight.dequantized"
    (product,) = (node for node in model.graph.node if weight in node.input)
    product.input[list(product.input).index(after)] = codes.input[0]


def _without_weight_codes(model: Any, layer: str) -> None:
    """The layer's weight is stored in full, under a name of its own."""
    import onnx

    name = f"{layer}.weight.dequantized"
    node = next(node for node in model.graph.node if node.output[0] == name)
    (codes,) = (value for value in model.graph.initializer if value.name == node.input[0])
    whole = onnx.numpy_helper.to_array(codes).astype("float32")
    model.graph.node.remove(node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(whole, name))


def test_nothing_is_unexplained_in_a_recipes_own_graph(int8_bundle: Path) -> None:
    bundle = Bundle.open(int8_bundle)
    joined = _joined(bundle, bundle.onnx_file("denoiser"))
    assert failures(joined, [GATE, "unfolded-qdq"]) == []
    counts, products = joined["recipe"]["counts"], joined["recipe"]["products"]
    assert counts[HIGHER] == counts[NOT_ASKED] == 0
    plan = bundle.manifest["graphs"]["denoiser"]["quantization"]["layers"]
    asked = {name for name, entry in plan.items() if entry["precision"] != "as exported"}
    assert {product["name"] for product in products if product["verdict"] == AS_ASKED} == asked
    kept = [product for product in products if product["name"] == "proj_out"]
    assert [product["reason"] for product in kept] == ["its rounding is the velocity's own"]
    assert all(product["reason"] for product in products)


@pytest.mark.parametrize("damage", [_without_input_codes, _without_weight_codes])
def test_codes_taken_out_of_the_graph_are_noticed(
    int8_bundle: Path, tmp_path: Path, damage: Callable[[Any, str], None]
) -> None:
    import onnx

    layer = "transformer_blocks.1.ff.net.2"
    bundle = Bundle.open(int8_bundle)
    model = onnx.load(str(bundle.onnx_file("denoiser")))
    damage(model, layer)
    onnx.save(model, str(tmp_path / "denoiser.onnx"))
    joined = _joined(bundle, tmp_path / "denoiser.onnx")
    (failure,) = failures(joined, [GATE])
    assert layer in failure
    assert joined["recipe"]["counts"][HIGHER] >= 1
    assert layer in {
        product["name"] for product in joined["recipe"]["products"] if product["verdict"] == HIGHER
    }


def test_the_gate_of_build(int8_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle whose graph lost a layer's codes, with hashes that fit: built, and exit code 1."""
    import onnx

    folder = shutil.copytree(int8_bundle, tmp_path / "bundle")
    file = folder / "onnx" / "denoiser.onnx"
    model = onnx.load(str(file))
    _without_input_codes(model, "transformer_blocks.1.ff.net.2")
    onnx.save(model, str(file))
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {name: value for name, value in manifest.items() if name not in _COMPUTED})
    page = tmp_path / "report.md"
    command = ["build", str(folder), "--target", "sm89", "--stage", "denoiser", "--no-cache"]
    command += ["--optimization-level", "0", "--report", str(page)]
    assert main([*command, "--fail-on", GATE]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"error: sm89, denoiser: {GATE}: transformer_blocks.1.ff.net.2: the recipe asks for int8" in error
    text = page.read_text()
    assert "1 unexplained" in text
    assert "Unexplained: transformer_blocks.1.ff.net.2." in text
    assert "its rounding is the velocity's own" in text


def test_a_bundle_without_a_recipe_has_no_such_gate(parity_bundle: Path, capsys: Any) -> None:
    bundle = Bundle.open(parity_bundle, hashes=False)
    check_recipe_gate(["unfolded-qdq"], bundle)
    with pytest.raises(InputError, match="compares products with a recipe"):
        check_recipe_gate([GATE], bundle)
    assert main(["build", str(parity_bundle), "--target", "sm89", "--fail-on", GATE]) == 2
    assert "export it with --quantize" in " ".join(capsys.readouterr().err.split())
    assert bundle.targets == ()
