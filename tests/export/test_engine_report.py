"""Engine reports: hand-made graphs whose precisions, costs and reasons can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.export.engine_inspector import InspectedEngine
from proteus_deploy.export.engine_layers import LayerGraph, read_layers
from proteus_deploy.export.engine_precisions import Precisions
from proteus_deploy.export.engine_report import (
    HANDED,
    INSPECTED,
    add_inspection,
    check_gates,
    failures,
    report_network,
)
from proteus_deploy.runtime.tensorrt_api import TensorRT

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

WIDTH = 64
Layers = Callable[..., LayerGraph]


class Network:
    """An ONNX graph that grows node by node; every float tensor is float16 unless told otherwise."""

    def __init__(self, kind: str = "FLOAT16") -> None:
        self.kind = getattr(onnx.TensorProto, kind)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.taken: list[Any] = []

    def input(self, name: str, *shape: int | str) -> str:
        self.taken.append(onnx.helper.make_tensor_value_info(name, self.kind, list(shape)))
        return name

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(onnx.numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a node; it and its output have the same name."""
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def scale(self, name: str, value: Any) -> str:
        return self.constant(name, onnx.numpy_helper.to_array(_tensor(self.kind, value)))

    def pair(self, tensor: str, name: str) -> str:
        """Q/DQ with one scale in int8; the name of the dequantised tensor."""
        import numpy as np

        scale = self.scale(f"{name}_scale", np.array(0.1))
        zero = self.constant(f"{name}_zero", np.array(0, np.int8))
        self.add("QuantizeLinear", [tensor, scale, zero], f"{name}_q")
        return self.add("DequantizeLinear", [f"{name}_q", scale, zero], f"{name}_dq")

    def weight(self, name: str, *, quantised: bool, width: int = WIDTH) -> str:
        """A square weight, in int8 with a scale for each row or in full; the tensor to multiply with."""
        import numpy as np

        if not quantised:
            return self.scale(name, np.full((width, width), 0.5))
        self.constant(name, np.ones((width, width), np.int8))
        scale = self.scale(f"{name}_scale", np.full(width, 0.1))
        zero = self.constant(f"{name}_zero", np.zeros(width, np.int8))
        return self.add("DequantizeLinear", [name, scale, zero], f"{name}_dq", axis=0)

    def save(self, file: Path, outputs: Sequence[str], *, opset: int = 20) -> Path:
        found = [onnx.helper.make_tensor_value_info(name, self.kind, None) for name in outputs]
        graph = onnx.helper.make_graph(self.nodes, "made", self.taken, found, self.constants)
        versions = [onnx.helper.make_opsetid("", opset)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10), str(file))
        return file


def _tensor(kind: int, value: Any) -> Any:
    return onnx.helper.make_tensor("", kind, value.shape, value.flatten().tolist())


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    """layers(network, outputs, **shapes) -> what TensorRT made of it."""

    def read(network: Network, outputs: Sequence[str], opset: int = 20, **shapes: Any) -> LayerGraph:
        api = TensorRT.load("tensorrt_rtx")
        _, parsed = api.new_network()
        parser = api.parse(parsed, network.save(tmp_path / "made.onnx", outputs, opset=opset))
        before = [tuple(parsed.get_input(index).shape) for index in range(parsed.num_inputs)]
        graph = read_layers(parsed, api.module, shapes)
        assert [tuple(parsed.get_input(index).shape) for index in range(parsed.num_inputs)] == before
        del parser
        return graph

    return read


def _codes(report: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {finding["code"]: tuple(finding["layers"]) for finding in report["findings"]}


def _chain(high: Sequence[int] = (), count: int = 3) -> Network:
    """x through `count` products; those of `high` in full precision, the others in int8."""
    network = Network()
    tensor = network.input("x", "B", WIDTH)
    for index in range(count):
        few = index not in high
        weight = network.weight(f"w{index}", quantised=few)
        tensor = network.add(
            "MatMul", [network.pair(tensor, f"x{index}") if few else tensor, weight], f"p{index}"
        )
    return network


def test_all_quantised_has_nothing_to_say(layers: Layers) -> None:
    report = report_network(layers(_chain(), ["p2"], x=(8, WIDTH)), "fp16")
    assert report["source"] == HANDED
    assert report["quantised"]
    assert report["precisions"] == {"int8": 1.0}
    assert report["findings"] == []
    assert report["reformats"] is None, "not known without a GPU, which isn't none"


def test_costs_are_those_counted_by_hand(layers: Layers) -> None:
    report = report_network(layers(_chain(count=1), ["p0"], x=(8, WIDTH)), "fp16")
    (product,) = [row for row in report["layers"] if row["operator"] == "matrix_multiply"]
    assert product["name"] == "p0"
    assert product["weight"] == "w0"
    assert product["asked"] == "int8"
    assert product["taken"] is None
    assert product["flops"] == 2 * 8 * WIDTH * WIDTH
    # int8 activations and weights, a float16 result
    assert product["bytes"] == 8 * WIDTH + WIDTH * WIDTH + 2 * 8 * WIDTH


def test_product_left_in_high_precision_is_named(layers: Layers) -> None:
    report = report_network(layers(_chain(high=[1]), ["p2"], x=(8, WIDTH)), "fp16")
    assert _codes(report) == {"high-precision-product": ("w1",)}
    (finding,) = report["findings"]
    assert "w1 stays in fp16 between quantised products" in finding["text"]
    assert 0.3 < finding["share"] < 1 / 3, "one product of three, and the quantising beside it"
    assert failures(report, ["high-precision-product"]) == [f"high-precision-product: {finding['text']}"]
    assert failures(report, ["unfolded-qdq"]) == []


@pytest.mark.parametrize("high", [[0], [2], [0, 2]])
def test_first_and_last_product_may_stay_high(layers: Layers, high: list[int]) -> None:
    assert report_network(layers(_chain(high=high), ["p2"], x=(8, WIDTH)), "fp16")["findings"] == []


def test_unquantised_graph_has_no_high_products(layers: Layers) -> None:
    report = report_network(layers(_chain(high=[0, 1, 2]), ["p2"], x=(8, WIDTH)), "fp16")
    assert not report["quantised"]
    assert report["findings"] == []


def test_dequantised_numbers_that_no_product_reads(layers: Layers) -> None:
    network = _chain(count=1)
    network.add("Add", [network.pair("p0", "late"), "p0"], "sum")
    report = report_network(layers(network, ["sum"], x=(8, WIDTH)), "fp16")
    assert _codes(report) == {"unfolded-qdq": ("late_dq",)}
    assert "late_dq is read by sum (elementwise)" in report["findings"][0]["text"]


def test_moving_numbers_does_not_unfold(layers: Layers) -> None:
    network = Network()
    network.input("x", WIDTH, 8)
    network.add("Transpose", [network.pair("x", "x")], "turned", perm=[1, 0])
    network.add("MatMul", ["turned", network.weight("w", quantised=True)], "y")
    graph = layers(network, ["y"])
    assert report_network(graph, "fp16")["findings"] == []
    assert report_network(graph, "fp16")["precisions"] == {"int8": 1.0}


@pytest.mark.parametrize(("rows", "bound"), [(8, False), (4096, True)])
def test_weight_only_helps_where_memory_is_the_limit(layers: Layers, rows: int, bound: bool) -> None:
    network = Network()
    network.input("x", "B", 1024)
    network.add("MatMul", ["x", network.weight("w", quantised=True, width=1024)], "y")
    report = report_network(layers(network, ["y"], x=(rows, 1024)), "fp16")
    assert report["precisions"] == {"int8 weights, fp16 activations": 1.0}
    assert _codes(report) == ({"weight-only": ("w",)} if bound else {})


def _attention(kind: str = "FLOAT16", *, quantise: Sequence[str] = (), tokens: str = "S") -> Network:
    network = Network(kind)
    for name in "qkv":
        network.input(name, 2, 4, tokens if name == "q" else "T", WIDTH)
    given = {name: network.pair(name, name) if name in quantise else name for name in "qkv"}
    network.add("Transpose", [given["k"]], "kt", perm=[0, 1, 3, 2])
    network.add("MatMul", [given["q"], "kt"], "scores")
    network.add("Softmax", ["scores"], "probabilities", axis=-1)
    weights = network.pair("probabilities", "p") if "p" in quantise else "probabilities"
    network.add("MatMul", [weights, given["v"]], "y")
    return network


SHAPES = {"q": (2, 4, 500, WIDTH), "k": (2, 4, 500, WIDTH), "v": (2, 4, 500, WIDTH)}


@pytest.mark.parametrize(
    ("options", "outputs", "state", "reason"),
    [
        ({}, ["y"], "can be fused", ""),
        ({"kind": "FLOAT"}, ["y"], "can't be fused", "it computes in fp32"),
        ({}, ["y", "probabilities"], "can't be fused", "an output of the graph"),
        ({"quantise": "qk"}, ["y"], "can't be fused", "scores is quantised and y is not"),
        ({"quantise": "qkvp"}, ["y"], "can be fused", ""),
    ],
    ids=["half", "single", "read outside", "half quantised", "quantised"],
)
def test_forms_of_attention(
    layers: Layers, options: dict[str, Any], outputs: list[str], state: str, reason: str
) -> None:
    report = report_network(layers(_attention(**options), outputs, **SHAPES), "fp16")
    (entry,) = report["attention"]
    assert (entry["state"], entry["taken"]) == (state, None)
    assert reason in entry["reason"]
    assert entry["nodes"] == ["scores", "probabilities", "y"]
    assert entry["scores_bytes"] == 2 * 4 * 500 * 500 * (4 if options.get("kind") == "FLOAT" else 2)
    assert ("unfused-attention" in _codes(report)) == (state == "can't be fused")
    assert ("qdq-around-softmax" in _codes(report)) == (options.get("quantise") == "qkvp")


def test_reader_of_the_scores_forbids_fusion(layers: Layers) -> None:
    network = _attention()
    network.add("ReduceMax", ["scores"], "largest", keepdims=0)
    report = report_network(layers(network, ["y", "largest"], **SHAPES), "fp16")
    assert "largest reads its scores" in report["attention"][0]["reason"]


def test_few_keys_need_no_fusion(layers: Layers) -> None:
    shapes = {**SHAPES, "k": (2, 4, 12, WIDTH), "v": (2, 4, 12, WIDTH)}
    report = report_network(layers(_attention("FLOAT"), ["y"], **shapes), "fp32")
    assert report["attention"][0]["state"] == "needn't be fused"
    assert report["findings"] == []


def test_attention_operator(layers: Layers) -> None:
    network = Network()
    for name in "qkv":
        network.input(name, 2, 4, "S", WIDTH)
    network.add("Attention", ["q", "k", "v"], "y")
    report = report_network(layers(network, ["y"], opset=23, **SHAPES), "fp16")
    assert [(entry["name"], entry["state"]) for entry in report["attention"]] == [("y", "can be fused")]
    assert report["attention"][0]["scores_bytes"] == 2 * 4 * 500 * 500 * 2
    (row,) = [row for row in report["layers"] if row["operator"] == "attention"]
    assert row["flops"] == 4 * 2 * 4 * 500 * 500 * WIDTH


def test_float32_inside_a_16_bit_engine(layers: Layers) -> None:
    network = Network()
    network.input("x", "B", WIDTH)
    network.add("Cast", ["x"], "wide", to=onnx.TensorProto.FLOAT)
    network.kind = onnx.TensorProto.FLOAT
    network.add("MatMul", ["wide", network.weight("w", quantised=False)], "product")
    network.kind = onnx.TensorProto.FLOAT16
    network.add("Cast", ["product"], "y", to=onnx.TensorProto.FLOAT16)
    graph = layers(network, ["y"], x=(8, WIDTH))
    assert _codes(report_network(graph, "fp16")) == {"float32-layer": ("w",)}
    assert "w computes in fp32 inside a fp16 engine" in report_network(graph, "fp16")["findings"][0]["text"]
    assert report_network(graph, "fp32")["findings"] == []


def test_convolutions_count_their_window(layers: Layers) -> None:
    import numpy as np

    network = Network("FLOAT")
    network.input("x", 1, 4, "H", "H")
    network.constant("w", np.ones((8, 2, 3, 3), np.float32))
    network.add("Conv", ["x", "w"], "y", group=2, kernel_shape=[3, 3])
    (row,) = report_network(layers(network, ["y"], x=(1, 4, 10, 10)), "fp32")["layers"]
    assert row["flops"] == 2 * (8 * 8 * 8) * (2 * 3 * 3)
    assert row["bytes"] == 4 * (4 * 10 * 10 + 8 * 2 * 3 * 3 + 8 * 8 * 8)


def test_tiny_denoiser(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, hashes=False)
    graph = bundle.table.graph("denoiser")
    api = TensorRT.load("tensorrt_rtx")
    _, network = api.new_network()
    parser = api.parse(network, bundle.onnx_file("denoiser"))
    profile = bundle.table.profile(graph)
    read = read_layers(network, api.module, {name: sizes["opt"] for name, sizes in profile.items()})
    report = report_network(read, bundle.dtype)
    del parser
    assert report["precisions"] == {"fp32": 1.0}
    operators = bundle.manifest["graphs"]["denoiser"]["operators"]
    assert len(report["attention"]) == operators["Softmax"]
    states = {entry["state"] for entry in report["attention"]}
    assert states == {"can't be fused", "needn't be fused"}, "joint attention in fp32; identity attention"
    labels = {row["weight"] for row in report["layers"]}
    assert "transformer_blocks.0.attn1.to_q.weight" in labels
    products = [row for row in report["layers"] if row["operator"] == "matrix_multiply"]
    assert len(products) == operators["MatMul"] + operators["Gemm"]
    assert all(row["flops"] > 0 for row in products)


# Made by hand, in the form that NVIDIA's documentation of IEngineInspector gives for detailed verbosity;
# no engine of ours was inspected here.
INSPECTION: dict[str, Any] = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to p0",
            "LayerType": "Reformat",
            "Inputs": [
                {"Name": "x", "Dimensions": [8, 64], "Format/Datatype": "Row major linear FP16 format"}
            ],
            "Outputs": [{"Name": "x_r", "Dimensions": [8, 64], "Format/Datatype": "Row major Int8 format"}],
            "Metadata": "",
        },
        {
            "Name": "p0+p0_epilogue",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x_r", "Dimensions": [8, 64], "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "p0", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: x0_dq]\u001f[ONNX Layer: w0_dq]\u001e[ONNX Layer: p0]",
        },
        {
            "Name": "x1_q",
            "LayerType": "kgen",
            "Inputs": [{"Name": "p0", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "x1", "Dimensions": [8, 64], "Format/Datatype": "Int8"}],
            "Metadata": "[ONNX Layer: x1_q]",
        },
        {
            "Name": "p1",
            "LayerType": "gemm",
            "Inputs": [{"Name": "p0", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "p1", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: p1]",
        },
    ],
    "Bindings": ["x", "p1"],
}


def _inspected(folder: Path, document: Any = INSPECTION) -> InspectedEngine:
    file = folder / "made.layers.json"
    file.write_text(json.dumps(document))
    return InspectedEngine.read(file)


def test_inspector_says_what_was_taken(layers: Layers, tmp_path: Path) -> None:
    report = report_network(layers(_chain(count=2), ["p1"], x=(8, WIDTH)), "fp16")
    seen = add_inspection(report, _inspected(tmp_path))
    assert seen["source"] == INSPECTED
    taken = {row["name"]: row["taken"] for row in seen["layers"]}
    assert (taken["p0"], taken["p1"]) == ("int8", "fp16"), "p1 was asked for in int8"
    assert taken["x0_q"] is None, "not in the engine's list"
    assert seen["reformats"] == ["Reformatting CopyNode for Input Tensor 0 to p0"]
    assert _codes(seen) == {
        "reformat": ("Reformatting CopyNode for Input Tensor 0 to p0",),
        "unfolded-qdq": ("x1_q",),
        "slower-than-asked": ("w1",),
    }
    assert len(failures(seen, ["reformat", "unfolded-qdq"])) == 2


@pytest.mark.parametrize("together", [True, False])
def test_inspector_says_whether_attention_was_fused(layers: Layers, tmp_path: Path, together: bool) -> None:
    report = report_network(layers(_attention(), ["y"], **SHAPES), "fp16")
    nodes = ["scores", "probabilities", "y"]
    groups = [nodes] if together else [nodes[:2], nodes[2:]]
    listed = [
        {
            "Name": "+".join(group),
            "LayerType": "kgen",
            "Inputs": [{"Name": "q", "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "Metadata": "\u001e".join(f"[ONNX Layer: {node}]" for node in group),
        }
        for group in groups
    ]
    seen = add_inspection(report, _inspected(tmp_path, {"Layers": listed}))
    assert seen["attention"][0]["taken"] == ("fused" if together else "not fused")
    assert ("unfused-attention" in _codes(seen)) == (not together)


def test_names_alone_say_nothing(layers: Layers, tmp_path: Path) -> None:
    report = report_network(layers(_chain(), ["p2"], x=(8, WIDTH)), "fp16")
    assert add_inspection(report, _inspected(tmp_path, {"Layers": ["p0", "p1"]})) == report


@pytest.mark.parametrize("document", [[], {"Layers": 1}, "text"])
def test_what_is_no_layer_report_is_named(tmp_path: Path, document: Any) -> None:
    with pytest.raises(BundleError, match=r"made\.layers\.json has no list 'Layers'"):
        _inspected(tmp_path, document)


def test_gates_that_cannot_be_decided_are_refused() -> None:
    check_gates(["unfused-attention", "unfolded-qdq"], inspected=False)
    check_gates(["reformat"], inspected=True)
    with pytest.raises(InputError, match="reformat can't be decided here"):
        check_gates(["reformat"], inspected=False)
    with pytest.raises(InputError, match="--fail-on 'slow' is unknown; choose from unfused-attention"):
        check_gates(["slow"], inspected=True)


def test_empty_network_has_no_rows() -> None:
    assert Precisions(LayerGraph(())).rows == ()
    assert report_network(LayerGraph(()), "fp16")["findings"] == []
