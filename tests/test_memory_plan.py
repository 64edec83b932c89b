"""Memory plans: graphs whose bytes can be counted by hand, a bundle's stages, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from proteus_deploy.benchmarks.machine import describe_machine
from proteus_deploy.bundle import Bundle
from proteus_deploy.cli.main import main
from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.graph_memory import Fusion, GraphMemory, graph_memory
from proteus_deploy.memory_plan import (
    RUNTIMES,
    RequestSize,
    combine,
    plan_memory,
    predict_graph,
    request_symbols,
)
from proteus_deploy.onnx_shapes import TensorInfo, infer_tensors, read_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

FLOAT, INT8, INT64 = 1, 3, 7


def _model(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    constants: Mapping[str, Any] | None = None,
    *,
    opset: int = 20,
) -> Any:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes),
        "made",
        [value(name, FLOAT, list(shape)) for name, shape in inputs.items()],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        [
            tensor if isinstance(tensor, onnx.TensorProto) else onnx.numpy_helper.from_array(tensor, name)
            for name, tensor in (constants or {}).items()
        ],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def _node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, inputs.split(), output.split(), name=output, **attributes)


def _ones(*shape: int, dtype: str = "float32") -> Any:
    import numpy as np

    return np.ones(shape, dtype)


def test_chain_counts_what_lives_at_one_time() -> None:
    """x [10, 20] -> 10 x 30 -> 10 x 40 -> 10 x 5: most while the third is made from the second."""
    model = _model(
        [
            _node("MatMul", "x a", "first"),
            _node("MatMul", "first b", "second"),
            _node("MatMul", "second c", "y"),
        ],
        {"x": ["B", 20]},
        ["y"],
        {"a": _ones(20, 30), "b": _ones(30, 40), "c": _ones(40, 5)},
    )
    found = graph_memory(model, {"x": (10, 20)}, Fusion())
    assert found.weights == {"FLOAT": 4 * (20 * 30 + 30 * 40 + 40 * 5)}
    assert found.largest_weight == 4 * 30 * 40
    assert found.activations == 4 * (10 * 20 + 10 * 30 + 10 * 40), "the input is the caller's and stays"
    assert found.at == "second"
    assert graph_memory(model, {"x": (20, 20)}, Fusion()).activations == 2 * found.activations


def test_a_tensor_that_is_read_again_stays() -> None:
    nodes = [
        _node("MatMul", "x a", "kept"),
        _node("MatMul", "kept a", "other"),
        _node("MatMul", "other a", "last"),
    ]
    model = _model([*nodes, _node("Add", "kept last", "y")], {"x": [8, 8]}, ["y"], {"a": _ones(8, 8)})
    square = 4 * 8 * 8
    # x, kept, other, last together; the sum is written over one of them
    assert graph_memory(model, {"x": (8, 8)}, Fusion()).activations == 4 * square


def test_element_by_element_in_place_and_reshapes_for_nothing() -> None:
    import numpy as np

    nodes = [_node("MatMul", "x a", "product"), _node("Relu", "product", "positive")]
    nodes += [_node("Reshape", "positive shape", "flat"), _node("Neg", "flat", "y")]
    constants = {"a": _ones(8, 8), "shape": np.array([-1], np.int64)}
    found = graph_memory(_model(nodes, {"x": [8, 8]}, ["y"], constants), {"x": (8, 8)}, Fusion())
    assert found.activations == 2 * 4 * 8 * 8, "the input and one buffer"
    assert found.weights == {"FLOAT": 4 * 64, "INT64": 8}


def test_inputs_are_never_written_over() -> None:
    model = _model([_node("Relu", "x", "y")], {"x": [8, 8]}, ["y"])
    assert graph_memory(model, {"x": (8, 8)}, Fusion()).activations == 2 * 4 * 8 * 8


def test_broadcast_is_not_in_place() -> None:
    model = _model(
        [_node("MatMul", "x a", "row"), _node("Add", "row x", "y")], {"x": [8, 8]}, ["y"], {"a": _ones(8, 1)}
    )
    assert graph_memory(model, {"x": (8, 8)}, Fusion()).activations == 4 * (64 + 8 + 64)


def test_weights_of_weights_are_weights() -> None:
    """Transposing a weight is done once; its result takes the weight's place."""
    nodes = [_node("Transpose", "a", "at", perm=[1, 0]), _node("MatMul", "x at", "y")]
    found = graph_memory(
        _model(nodes, {"x": [2, 200]}, ["y"], {"a": _ones(300, 200)}), {"x": (2, 200)}, Fusion()
    )
    assert found.activations == 4 * 2 * (200 + 300)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_scores_where_it_is_not_fused(fused: bool) -> None:
    nodes = [
        _node("MatMul", "q k", "scores"),
        _node("Softmax", "scores", "p", axis=-1),
        _node("MatMul", "p v", "y"),
    ]
    model = _model(nodes, {"q": [4, "S", 16], "k": [4, 16, "S"], "v": [4, "S", 16]}, ["y"])
    shapes = {"q": (4, 100, 16), "k": (4, 16, 100), "v": (4, 100, 16)}
    found = graph_memory(model, shapes, Fusion(attention=fused))
    scores = 0 if fused else 4 * 4 * 100 * 100  # the softmax is written over them
    assert found.activations == scores + 4 * 4 * (4 * 100 * 16)


def test_quantised_weights_count_their_bits() -> None:
    import numpy as np

    packed = onnx.helper.make_tensor("w4", onnx.TensorProto.INT4, [64, 32], [1] * 64 * 32)
    nodes = [
        _node("DequantizeLinear", "w8 s8", "d8"),
        _node("DequantizeLinear", "w4 s4", "d4", axis=0, block_size=32),
    ]
    nodes += [_node("MatMul", "x d8", "middle"), _node("MatMul", "middle d4", "y")]
    constants = {
        "w8": _ones(64, 64, dtype="int8"),
        "s8": np.array(0.5, np.float32),
        "w4": packed,
        "s4": _ones(2, 32),
    }
    model = _model(nodes, {"x": [2, 64]}, ["y"], constants, opset=21)
    apart = graph_memory(model, {"x": (2, 64)}, Fusion())
    assert apart.weights == {"INT8": 64 * 64, "FLOAT": 4 * (1 + 2 * 32), "INT4": 64 * 32 // 2}
    # both weights are dequantised before the first product, which reads one of them
    assert apart.activations == 4 * (2 * 64 + 64 * 64 + 64 * 32 + 2 * 64)
    fused = graph_memory(model, {"x": (2, 64)}, Fusion(dequantize=True))
    assert fused.activations == 4 * (2 * 64 + 2 * 64 + 2 * 32)


def test_shapes_that_are_computed_are_followed() -> None:
    """[B, N, 6] -> [B·N, 2, 3], the way exporters write it."""
    import numpy as np

    nodes = [
        _node("Shape", "x", "rows", start=0, end=1),
        _node("Shape", "x", "columns", start=1, end=2),
        _node("Mul", "rows columns", "count"),
        _node("Concat", "count two three", "target", axis=0),
        _node("Reshape", "x target", "y"),
    ]
    constants = {"two": np.array([2], np.int64), "three": np.array([3], np.int64)}
    found = infer_tensors(_model(nodes, {"x": ["B", "N", 6]}, ["y"], constants), {"x": (5, 7, 6)})
    assert found["y"] == TensorInfo("FLOAT", (35, 2, 3))
    assert found["count"] == TensorInfo("INT64", (1,))


def test_shape_that_depends_on_the_data_is_named() -> None:
    model = _model([_node("NonZero", "x", "y")], {"x": [4]}, ["y"])
    with pytest.raises(
        BundleError, match=r"the shape of 'y', made by node 'y' \(NonZero\), depends on the data"
    ):
        infer_tensors(model, {"x": (4,)})
    with pytest.raises(BundleError, match="no shape for the graph's input 'x'"):
        infer_tensors(model, {})


def test_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 10)
    with pytest.raises(BundleError, match=r"a\.onnx can't be read"):
        read_model(tmp_path / "a.onnx")


def test_weights_beside_the_graph_are_counted_apart() -> None:
    runtime = RUNTIMES["onnxruntime"]
    stage = combine("one", {"one": GraphMemory({"FLOAT": 1000}, 0, "a", 300, external=800)}, runtime)
    assert stage.held == int(runtime.external * 800 + runtime.embedded * 200)


def test_stage_holds_all_of_its_graphs() -> None:
    runtime = RUNTIMES["eager"]
    graphs = {
        "one": GraphMemory({"FLOAT": 1000}, 400, "a", 300),
        "two": GraphMemory({"FLOAT": 600, "INT8": 8}, 900, "b", 200),
    }
    stage = combine("decoder", graphs, runtime)
    assert stage.weights == {"FLOAT": 1600, "INT8": 8}
    assert stage.held == int(runtime.embedded * 1608)
    assert stage.peak == stage.held + int(runtime.activations * 900)
    assert stage.at == "two: b"
    assert stage.streamed == 600


def test_plan_of_a_bundle(parity_bundle: Path) -> None:
    bundle = Bundle.open(parity_bundle, hashes=False)
    plan = plan_memory(bundle, RequestSize(), device_bytes=1)
    assert {stage.stage for stage in plan.stages} <= set(bundle.table.stages)
    peaks = {policy.policy: policy.peak for policy in plan.policies}
    assert peaks["--low-memory"] < peaks["all resident"]
    assert peaks["--low-memory, --vae-tiling"] <= peaks["--low-memory"]
    assert plan.tiled_decoder.activations <= next(
        stage.activations for stage in plan.stages if stage.stage == "vae_decoder"
    )
    assert not any(policy.fits for policy in plan.policies)
    assert all(policy.fits for policy in plan_memory(bundle, RequestSize(), device_bytes=1 << 50).policies)
    weights = sum(stage.weight_bytes for stage in plan.stages)
    assert peaks["all resident"] > RUNTIMES["onnxruntime"].embedded * weights
    streamed = plan_memory(bundle, RequestSize(), backend="tensorrt")
    assert "weight streaming" in {policy.policy for policy in streamed.policies}
    json.dumps(plan.to_json())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (RequestSize(height=33), "height is 33; it must be a multiple of 16"),
        (RequestSize(width=16 * 1000), r"columns \(width / \d+\) \(\w\) is \d+; the declared range is"),
        (RequestSize(num_frames=1), "num_frames is 1; a video has at least 2 latent frames"),
    ],
)
def test_sizes_that_the_bundle_cannot_serve(parity_bundle: Path, size: RequestSize, message: str) -> None:
    bundle = Bundle.open(parity_bundle, hashes=False)
    with pytest.raises(InputError, match=message):
        request_symbols(bundle.table, bundle.transformer.backbone, size)


def test_backend_without_assumptions(parity_bundle: Path) -> None:
    with pytest.raises(InputError, match="no memory plan for backend 'openvino'"):
        plan_memory(Bundle.open(parity_bundle, hashes=False), RequestSize(), backend="openvino")


def test_command_says_what_fits(parity_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", str(parity_bundle), "--memory"]
    assert main([*command, "--device-memory", "0.000001"]) == 0
    printed = capsys.readouterr().out
    assert "--low-memory, --vae-tiling" in printed
    assert "MiB too much" in printed
    assert "predicted for onnxruntime, not measured: attention writes its scores" in printed
    assert main([*command, "--json", "--backend", "tensorrt"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "tensorrt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", "64"], "--height belongs to --memory"),
        (["--memory", "--device-memory", "0"], "--device-memory is 0.0; give GiB above 0"),
        (["--memory", "--backend", "none"], "no memory plan for backend 'none'"),
    ],
)
def test_command_refuses(
    parity_bundle: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["inspect", str(parity_bundle), *flags]) == 2
    assert message in capsys.readouterr().err


def test_prediction_of_a_graph_follows_the_request(parity_bundle: Path) -> None:
    bundle = Bundle.open(parity_bundle, hashes=False)
    graph = bundle.table.graph("denoiser")
    sizes = bundle.table.sizes("min")
    small = predict_graph(bundle, graph, sizes, Fusion())
    large = predict_graph(bundle, graph, bundle.table.sizes("max"), Fusion())
    assert small.weights == large.weights
    assert small.activations < large.activations


def _results(repository: Path) -> dict[str, Any]:
    file = repository / "benchmarks/results/memory_plan.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def test_results_follow_from_their_rows(repository: Path) -> None:
    from proteus_deploy.benchmarks.memory_plan import summary

    document = _results(repository)
    assert document["summary"] == summary(document["rows"])
    assert not document["commit"].endswith("-dirty")
    assert document["assumptions"]["onnxruntime"] == RUNTIMES["onnxruntime"].text


def test_prediction_is_as_close_to_a_measured_peak_as_the_results_say(
    tiny_bundle: Path, tmp_path: Path, repository: Path
) -> None:
    """The face parser at its one size: the widest graph of the tiny checkpoint, far above a page's noise."""
    from proteus_deploy.benchmarks.stage_memory import measure_graph

    made_on, here = _results(repository)["machine"]["extensions"], describe_machine()["extensions"]
    if made_on != here:
        pytest.skip(
            f"ONNX Runtime lays out weights by instruction set: the results have {made_on}, here is {here}"
        )
    bundle = Bundle.open(tiny_bundle, hashes=False)
    graph, runtime = bundle.table.graph("face_parser"), RUNTIMES["onnxruntime"]
    predicted = combine("face_parser", {"": predict_graph(bundle, graph, {}, runtime.fusion)}, runtime).peak
    measured = measure_graph(
        "face_parser", "onnxruntime", bundle=tiny_bundle, size="tiny", work=tmp_path, symbols={}
    )
    ratios = [row["ratio"] for row in _results(repository)["rows"] if row["backend"] == "onnxruntime"]
    ratio = predicted / measured["running_bytes"]
    assert min(ratios) <= ratio <= max(ratios), f"predicted over measured is {ratio:.2f}"
