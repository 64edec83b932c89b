"""A small bundle written by hand: two stages, three graphs, no exporter involved. Exports traced once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from proteus_deploy.bundle import Bundle, write_manifest
from proteus_deploy.stages import AxisRange, Graph, StageTable, TensorSpec

if TYPE_CHECKING:
    from proteus_deploy.export.onnx_graph import ExportedGraph

WIDTH = 16

FIRST = Graph(
    "first",
    "first",
    (TensorSpec("x", ("B", WIDTH)), TensorSpec("timestep", ("B",), "int64", "timesteps", 1000)),
    (TensorSpec("y", ("B", WIDTH)),),
)
SECOND = Graph(
    "second_start",
    "second",
    (TensorSpec("a", ("S", "2h")), TensorSpec("gate", (1,), "float32", "gate")),
    (TensorSpec("b", ("S", "2h")),),
)
THIRD = Graph("second_next", "second", SECOND.inputs, SECOND.outputs)
TABLE = StageTable(
    {"B": AxisRange(1, 2, 4), "S": AxisRange(3, 3, 3), "h": AxisRange(2, 8, 64)}, (FIRST, SECOND, THIRD)
)


def make_model(
    graph: Graph, dtype: str, *, weight: float = 0.1, table: StageTable = TABLE, **changes: Any
) -> Any:
    """An ONNX model of `graph`: x·W + timestep, or a * gate. `changes`: {tensor name: (dtype, axes)}."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    kinds = {"float": kind, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def value(spec: TensorSpec) -> Any:
        wanted, axes = changes.get(spec.name, (spec.dtype, spec.axes))
        shape = [
            table.axes[axis].opt if axis in table.axes and not table.is_dynamic(axis) else axis
            for axis in axes
        ]
        return helper.make_tensor_value_info(spec.name, kinds[wanted], shape)

    initialisers = []
    if graph.name == "first":
        form = helper.tensor_dtype_to_np_dtype(kind)
        weights = [weight * (index % 7 - 3) for index in range(WIDTH * WIDTH)]
        initialisers = [
            # Raw bytes: nothing else can be external data.
            numpy_helper.from_array(np.array(weights, form).reshape(WIDTH, WIDTH), "w"),
            helper.make_tensor("last", TensorProto.INT64, (1,), [1]),
        ]
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"], name="node_product"),
            helper.make_node("Cast", ["timestep"], ["time"], to=kind),
            helper.make_node("Unsqueeze", ["time", "last"], ["column"]),
            helper.make_node("Add", ["product", "column"], ["y"]),
        ]
    else:
        nodes = [
            helper.make_node("Cast", ["gate"], ["factor"], to=kind),
            helper.make_node("Mul", ["a", "factor"], ["b"], name="node_gate"),
        ]
    body = helper.make_graph(
        nodes, graph.name, [value(s) for s in graph.inputs], [value(s) for s in graph.outputs], initialisers
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_bundle(folder: Path, dtype: str = "fp32", *, weight: float = 0.1) -> Bundle:
    """Write a bundle into the new folder `folder`; weights of the graph "first" are external data."""
    import onnx

    (folder / "onnx").mkdir(parents=True)
    for graph in TABLE.graphs:
        onnx.save(
            make_model(graph, dtype, weight=weight),
            str(folder / f"onnx/{graph.name}.onnx"),
            save_as_external_data=graph is FIRST,
            location=f"{graph.name}.onnx.data",
            size_threshold=64,
        )
    document = {
        "checkpoint": {},
        "dtype": dtype,
        "stage_table": TABLE.to_json(),
        "graphs": {
            graph.name: {
                "file": f"onnx/{graph.name}.onnx",
                "files": sorted(f"onnx/{file.name}" for file in folder.glob(f"onnx/{graph.name}.onnx*")),
                "operators": {},
            }
            for graph in TABLE.graphs
        },
        "versions": {},
        "parity": {},
    }
    write_manifest(folder, document)
    return Bundle.open(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    pytest.importorskip("onnx")
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def new_model() -> Callable[..., Any]:
    pytest.importorskip("onnx")
    return make_model


@pytest.fixture
def new_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    pytest.importorskip("onnx")
    return lambda name, *args, **options: make_bundle(tmp_path / name, *args, **options)


class TracedOnce:
    """Stands in for `export.export_graph`: a plain bundle's graphs are copied, not traced again.

    Quantised graphs start from a trace that each graph has once. Other precisions and made-up weights are
    exported as ever.
    """

    def __init__(self, plain: Bundle, original: Callable[..., ExportedGraph]) -> None:
        self._plain, self._original = plain, original
        self._traces: dict[str, Any] = {}

    def __call__(
        self, graph: Graph, table: StageTable, network: Any, destination: Path, **settings: Any
    ) -> ExportedGraph:
        from proteus_deploy.export.onnx_graph import ExportedGraph, traced_model, write_model
        from proteus_deploy.weights import RandomWeights

        quantisation, dtype = settings.get("quantisation"), settings["dtype"]
        if dtype != torch.float32 or isinstance(network.source, RandomWeights):
            return self._original(graph, table, network, destination, **settings)
        if quantisation is None:
            shutil.copyfile(self._plain.onnx_file(graph.name), destination)
            record = self._plain.manifest["graphs"][graph.name]
            return ExportedGraph((destination.name,), record["opset"], record["operators"], 0)
        if graph.name not in self._traces:
            self._traces[graph.name] = traced_model(graph, table, network, dtype=dtype), network
        model, first = self._traces[graph.name]
        return write_model(model.clone(), first, destination, dtype=dtype, quantisation=quantisation)


@pytest.fixture(scope="session")
def export_traced_once() -> Callable[[Path], TracedOnce]:
    """export_traced_once(bundle) -> what a test sets as `export.export_graph`; of one checkpoint only."""
    from proteus_deploy.export.onnx_graph import export_graph

    return lambda bundle: TracedOnce(Bundle.open(bundle, hashes=False), export_graph)
