"""Instance norms of float16 graphs, computed in float32.

The autoencoder's group norms come out of the exporter as InstanceNormalization, which, unlike ONNX's layer
norm, has no attribute for the precision of its sums. A group of a decoder's frame holds up to millions of
values, and the square of one above 256 is past float16's range: the norm then sees infinite variance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["widen_norms"]

_NORM = "InstanceNormalization"


def widen_norms(model: onnx_ir.Model) -> int:
    """Put casts around each float16 InstanceNormalization, in place. Returns how many there were."""
    import onnx_ir as ir

    graph = model.graph
    norms = [
        node
        for node in graph
        if node.op_type == _NORM and not node.domain and _kind(node.inputs[0]) == ir.DataType.FLOAT16
    ]
    widened: dict[ir.Value, ir.Value] = {}
    for number, norm in enumerate(norms):
        for index, value in enumerate(norm.inputs):
            assert value is not None
            if value not in widened:
                cast = _cast(value, ir.DataType.FLOAT, f"{norm.name or _NORM}_{number}_float32_{index}")
                graph.insert_before(norm, cast)
                widened[value] = cast.outputs[0]
            norm.replace_input_with(index, widened[value])
        narrow = norm.outputs[0]
        assert narrow.name is not None
        wide = ir.Value(
            name=f"{narrow.name}_float32", type=ir.TensorType(ir.DataType.FLOAT), shape=narrow.shape
        )
        replacement = ir.Node(
            "", _NORM, norm.inputs, list(norm.attributes.values()), outputs=[wide], name=norm.name
        )
        back = _cast(wide, ir.DataType.FLOAT16, f"{norm.name or _NORM}_{number}_float16")
        graph.insert_before(norm, [replacement, back])
        name, shape = narrow.name, narrow.shape
        ir.convenience.replace_all_uses_with(narrow, back.outputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)
        back.outputs[0].name, back.outputs[0].shape = name, shape
    return len(norms)


def _kind(value: onnx_ir.Value | None) -> onnx_ir.DataType | None:
    return None if value is None else value.dtype


def _cast(value: onnx_ir.Value, kind: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    import onnx_ir as ir

    output = ir.Value(name=name, type=ir.TensorType(kind), shape=value.shape)
    return ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", int(kind))], outputs=[output], name=f"node_{name}"
    )
