"""Shape and type of every tensor of an ONNX graph at given input sizes.

ONNX's own inference over a whole model gives up where a Reshape's target was computed from other shapes.
Here nodes are taken in order, arithmetic on small tensors is carried out, and ONNX infers each node alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_deploy.errors import BackendError, BundleError

_LARGEST_VALUE = 1 << 14  # elements of a tensor whose numbers are followed: shapes, axes, positions
_BITS = {
    "FLOAT": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "DOUBLE": 64,
    "INT64": 64,
    "INT32": 32,
    "INT16": 16,
    "INT8": 8,
    "UINT8": 8,
    "UINT16": 16,
    "UINT32": 32,
    "UINT64": 64,
    "BOOL": 8,
    "FLOAT8E4M3FN": 8,
    "FLOAT8E5M2": 8,
    "FLOAT8E8M0": 8,
    "INT4": 4,
    "UINT4": 4,
    "FLOAT4E2M1": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """dtype: ONNX's name (FLOAT, INT8, …). shape: whole numbers."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Numbers of 4 bits are packed in twos. Raises BundleError for a type without a size (text)."""
        if self.dtype not in _BITS:
            raise BundleError(f"a tensor of type {self.dtype} has no size; no graph of ours holds one")
        return -(-self.elements * _BITS[self.dtype] // 8)


def read_model(onnx_file: Path) -> Any:
    """The ModelProto, without the weights that lie beside it. Raises BackendError or BundleError."""
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            'reading graphs needs the package onnx; install it with: pip install "proteus-deploy[onnx]"'
        ) from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(onnx_file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{onnx_file} can't be read ({error}); export the bundle again") from error


def infer_tensors(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, TensorInfo]:
    """{tensor: info} of inputs, initialisers and everything computed, with inputs of the given shapes.

    Raises BundleError naming the node whose result can't be inferred.
    """
    return _Inference(model, shapes).run()


class _Inference:
    def __init__(self, model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        import onnx

        self._onnx = onnx
        kinds = onnx.TensorProto
        self._followed = {kinds.INT64, kinds.INT32, kinds.BOOL, kinds.FLOAT}  # what shapes are computed in
        self._model = model
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._types: dict[str, Any] = {}  # name -> TypeProto
        self._values: dict[str, Any] = {}  # name -> array, of small tensors whose numbers are known
        for tensor in model.graph.initializer:
            self._types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            small = math.prod(tensor.dims) <= _LARGEST_VALUE
            if small and tensor.data_location != onnx.TensorProto.EXTERNAL:
                self._values[tensor.name] = onnx.numpy_helper.to_array(tensor)
        for value in model.graph.input:
            if value.name not in shapes:
                raise BundleError(f"no shape for the graph's input {value.name!r}; export the bundle again")
            kind = value.type.tensor_type.elem_type
            self._types[value.name] = onnx.helper.make_tensor_type_proto(kind, list(shapes[value.name]))

    def run(self) -> dict[str, TensorInfo]:
        for node in self._model.graph.node:
            self._infer(node)
        return {name: self._info(kind) for name, kind in self._types.items()}

    def _infer(self, node: Any) -> None:
        given = [name for name in node.input if name]
        if node.op_type == "Shape" and given[0] in self._types:
            import numpy as np

            sizes = [dim.dim_value for dim in self._types[given[0]].tensor_type.shape.dim]
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            known = np.array(sizes[bounds.get("start", 0) : bounds.get("end", len(sizes))], np.int64)
            self._keep(node.output[0], known)
            return
        whole = all(name in self._values for name in given) and not any(
            attribute.HasField("g") for attribute in node.attribute
        )
        plain = all(self._types[name].tensor_type.elem_type in self._followed for name in given)
        if whole and plain and self._evaluate(node):
            return
        self._infer_types(node, given)

    def _evaluate(self, node: Any) -> bool:
        """Carry the node out; False where its result is large, so that its type is enough."""
        import numpy as np
        from onnx.reference import ReferenceEvaluator

        given = [name for name in node.input if name]
        onnx = self._onnx
        inputs = [onnx.helper.make_value_info(name, self._types[name]) for name in dict.fromkeys(given)]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "one", inputs, outputs)
        alone = onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        with np.errstate(all="ignore"):  # log(0) and its cast, in T5's buckets of distances, mean nothing
            run: Any = ReferenceEvaluator(alone).run
            results = run(None, {name: self._values[name] for name in given})
        if any(result.size > _LARGEST_VALUE for result in results):
            return False
        for name, result in zip((name for name in node.output if name), results, strict=True):
            self._keep(name, result)
        return True

    def _keep(self, name: str, value: Any) -> None:
        import numpy as np

        value = np.asarray(value)
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        self._types[name] = self._onnx.helper.make_tensor_type_proto(kind, list(value.shape))
        self._values[name] = value

    def _infer_types(self, node: Any, given: Sequence[str]) -> None:
        onnx = self._onnx
        version = self._opsets.get(node.domain)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._types[name] for name in given},
                {
                    name: onnx.numpy_helper.from_array(self._values[name], name)
                    for name in given
                    if name in self._values
                },
                opset_imports=list(self._model.opset_import),
                ir_version=self._model.ir_version,
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, KeyError) as error:
            raise BundleError(
                f"the shape of node {node.name!r} ({node.op_type}) can't be inferred: {error}"
            ) from error
        for name in node.output:
            if name:
                self._types[name] = self._checked(node, name, found.get(name))

    def _checked(self, node: Any, name: str, kind: Any) -> Any:
        shape = None if kind is None else kind.tensor_type.shape
        if shape is None or any(not dim.HasField("dim_value") for dim in shape.dim):
            raise BundleError(
                f"the shape of {name!r}, made by node {node.name!r} ({node.op_type}), depends on the data"
            )
        return kind

    def _info(self, kind: Any) -> TensorInfo:
        tensor = kind.tensor_type
        dtype = self._onnx.TensorProto.DataType.Name(tensor.elem_type)
        return TensorInfo(dtype, tuple(dim.dim_value for dim in tensor.shape.dim))
