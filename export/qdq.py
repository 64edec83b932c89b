"""QuantizeLinear and DequantizeLinear around the products of a traced graph, as a plan asks for.

    x ─ Mul m ─ Mul 1/f ─ Quantize ─ Dequantize ─ MatMul ─ Mul f ─ Add bias
                     codes [K, N] ─ Dequantize ──┘

Each part is there only where the plan has it: m is SmoothQuant's or AWQ's multiplier, f the factor of the
timestep's group. Layers that share an input share everything up to its Dequantize. Weights get the layout
[K, N], so that the transpose of a Linear goes; weights that are folded are transposed back, for what reads
them. Weights are read, and quantised, while the file is written, one at a time. All nodes are ONNX's own.

Axes: N outputs, K inputs, B batch, G groups of timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.export.input_scaling import InputScaling, scale_inputs
from proteus_deploy.export.quantize import OPERANDS, GraphPlan, LayerPlan, is_folded
from proteus_deploy.export.weight_quantizers import (
    LARGEST_CODE,
    QuantisedWeight,
    quantise_weight,
    stored_scale,
)
from proteus_deploy.model.config import TRAIN_TIMESTEPS

if TYPE_CHECKING:
    import onnx_ir

    from proteus_deploy.export.activation_statistics import ActivationStatistics
    from proteus_deploy.model.networks import Network

# What a format needs: opset of its DequantizeLinear, and version of the file format that knows its type.
_OPSET = {"int8": 20, "fp8_e4m3": 20, "int4": 21, "nvfp4": 23}
_IR_VERSION = {"int8": 9, "fp8_e4m3": 9, "int4": 10, "nvfp4": 11}
_ACTIVATION_TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Quantisation:
    """What to do to one graph. statistics: needed where a rule of the plan reads them."""

    plan: GraphPlan
    statistics: ActivationStatistics | None = None


def insert_qdq(
    model: onnx_ir.Model, quantisation: Quantisation, network: Network, dtype: torch.dtype
) -> None:
    """Change `model` in place; weights of `network` are read when the model is saved.

    dtype: of activations. Scales take the dtype of the tensor that they belong to. Raises InputError where
    statistics lack a layer, and for a weight that the graph doesn't multiply with activations.
    """
    import onnx_ir.passes.common as common

    plan = quantisation.plan
    if not plan.formats:
        return

    def read(layer: str) -> Tensor:
        return network.source.tensor(network.key_of(f"{layer}.weight")).float()

    scalings = scale_inputs(plan, read, quantisation.statistics, dtype=dtype)
    writer = _Writer(model)
    model.graph.opset_imports[""] = max(
        model.graph.opset_imports[""], *(_OPSET[kind] for kind in plan.formats)
    )
    model.ir_version = max(model.ir_version, *(_IR_VERSION[kind] for kind in plan.formats))
    groups = _timestep_group(writer, quantisation) if _has_factors(scalings) else None
    for leader, layers in plan.groups().items():
        if is_folded(leader):
            _quantise_folded(writer, layers[0], read)
            continue
        _quantise_group(writer, leader, layers, scalings[leader], read, groups)
    for attention in plan.attention:
        if attention.format is not None:
            assert quantisation.statistics is not None
            ranges = {
                operand: float(quantisation.statistics.amax(f"{plan.graph}/{attention.name}.{operand}").max())
                for operand in OPERANDS
            }
            _quantise_attention(writer, attention.name, attention.format, ranges)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)


def _has_factors(scalings: dict[str, InputScaling]) -> bool:
    return any(scaling.factors is not None for scaling in scalings.values())


class _Writer:
    """Makes nodes and initialisers of one graph."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.graph = model.graph
        self.values: dict[str, Any] = {}  # of nodes made here, by name
        self._last: tuple[str, QuantisedWeight] | None = None

    def quantised(self, name: str, quantise: Callable[[], QuantisedWeight]) -> QuantisedWeight:
        """The weight `name`; only the last one is kept, for its scales, which are written after its codes."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is made
            self._last = name, quantise()
        return self._last[1]

    def node(
        self, operator: str, inputs: Sequence[Any], name: str, like: Any, shape: Any = None, **attributes: Any
    ) -> Any:
        """The output of a new node, of the dtype of `like` and its shape or another one."""
        import onnx_ir

        output = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(like.dtype),
            shape=onnx_ir.Shape(list(like.shape if shape is None else shape)),
        )
        node = onnx_ir.node(operator, inputs, attributes, outputs=[output], name=name)
        self.graph.append(node)
        self.values[name] = output
        return output

    def constant(self, name: str, value: Tensor, dtype: Any = None) -> Any:
        """An initialiser. dtype: an onnx_ir.DataType for 4-bit codes, which torch has no type for."""
        import onnx_ir

        tensor = onnx_tensor(value, name, dtype)
        result = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(tensor.dtype),
            shape=onnx_ir.Shape(tuple(value.shape)),
            const_value=tensor,
        )
        self.graph.register_initializer(result)
        return result

    def lazy(
        self, name: str, read: Callable[[], Tensor], shape: Sequence[int], dtype: onnx_ir.DataType
    ) -> Any:
        """An initialiser whose value is made when the file is written."""
        import onnx_ir

        tensor = onnx_ir.LazyTensor(
            lambda: onnx_tensor(read(), name, dtype),
            dtype=dtype,
            shape=onnx_ir.Shape(shape),
            name=name,
            cache=False,
        )
        result = onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape), const_value=tensor
        )
        self.graph.register_initializer(result)
        return result


def onnx_tensor(value: Tensor, name: str, dtype: onnx_ir.DataType | None = None) -> onnx_ir.TensorProtocol:
    """A torch tensor for ONNX. dtype INT4 or FLOAT4E2M1: codes of one byte each become half a byte."""
    import ml_dtypes
    import onnx_ir
    from onnx_ir import tensor_adapters

    packed = {onnx_ir.DataType.INT4: ml_dtypes.int4, onnx_ir.DataType.FLOAT4E2M1: ml_dtypes.float4_e2m1fn}
    if dtype in packed:
        codes = value.contiguous().numpy()
        array = codes.view(packed[dtype]) if value.dtype == torch.uint8 else codes.astype(packed[dtype])
        return onnx_ir.Tensor(array, dtype=dtype, name=name)
    return tensor_adapters.TorchTensor(value.contiguous(), name=name)


def _quantise_group(
    writer: _Writer,
    leader: str,
    layers: Sequence[LayerPlan],
    scaling: InputScaling,
    read: Callable[[str], Tensor],
    groups: Any,
) -> None:
    products = {layer.name: _product_of(writer, layer.name) for layer in layers}
    source = products[leader].inputs[0]
    scaled = _scaled_input(writer, leader, source, layers[0], scaling, groups)
    for layer in layers:
        product = products[layer.name]
        if product.inputs[0] is not source and scaled is not source:
            raise InputError(
                f"{layer.name} and {leader} do not read the same tensor in the traced graph, so they can't "
                "share its codes; give one of them a rule of its own"
            )
        weight = _quantised_weight(writer, layer, scaling.multiplier, read, product.inputs[1].dtype)
        product.replace_input_with(0, scaled if scaled is not source else product.inputs[0])
        product.replace_input_with(1, weight)
        if scaling.factors is not None:
            _multiply_after(writer, layer.name, product, leader)


def _quantise_folded(writer: _Writer, layer: LayerPlan, read: Callable[[str], Tensor]) -> None:
    """A weight that stands in other products than a Linear's: all that reads it reads it dequantised."""
    weight = writer.graph.initializers[f"{layer.name}.weight"]
    uses = list(weight.uses())
    assert weight.dtype is not None
    dequantised = _quantised_weight(writer, layer, None, read, weight.dtype)
    turned = writer.node("Transpose", [dequantised], f"{layer.name}.turned", weight, perm=[1, 0])
    for node, index in uses:
        node.replace_input_with(index, turned)


def _product_of(writer: _Writer, layer: str) -> Any:
    """The MatMul of a Linear, with its transposed weight as second input; a Gemm is taken apart."""
    weight = writer.graph.initializers.get(f"{layer}.weight")
    uses = list(weight.uses()) if weight is not None else []
    node = uses[0][0] if len(uses) == 1 else None
    if node is not None and node.op_type == "Transpose":
        uses = list(node.outputs[0].uses())
        if len(uses) == 1 and uses[0][0].op_type == "MatMul" and uses[0][1] == 1:
            return uses[0][0]
    if node is not None and node.op_type == "Gemm" and uses[0][1] == 1:
        return _matmul_of_gemm(writer, node, layer)
    raise InputError(
        f"the traced graph does not multiply activations with {layer}.weight alone, so it can't be quantised "
        "there; let the recipe keep it"
    )


def _matmul_of_gemm(writer: _Writer, gemm: Any, layer: str) -> Any:
    """x Wᵀ + b as MatMul and Add. torch writes a Linear of two axes as Gemm with transB."""
    x, weight, *bias = gemm.inputs
    output = gemm.outputs[0]
    turned = writer.node("Transpose", [weight], f"{layer}.turned", weight, list(reversed(weight.shape)))
    result = writer.node("MatMul", [x, turned], f"{layer}.product", output)
    product = result.producer()
    if bias:
        result = writer.node("Add", [result, bias[0]], f"{layer}.biased", output)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    writer.graph.remove(gemm, safe=True)
    return product


def _scaled_input(
    writer: _Writer, leader: str, x: Any, layer: LayerPlan, scaling: InputScaling, groups: Any
) -> Any:
    """The input after multiplier, factor and codes; `x` itself where nothing is to be done."""
    dtype = _torch_dtype(x)
    if scaling.multiplier is not None:
        multiplier = writer.constant(f"{leader}.input.multiplier", scaling.multiplier.to(dtype))
        x = writer.node("Mul", [x, multiplier], f"{leader}.input.smoothed", x)
    if scaling.factors is not None:
        stored = scaling.factors.to(dtype)
        axes = [1, 2] if len(x.shape) == 3 else [1]
        where = writer.constant(f"{leader}.input.axes", torch.tensor(axes))
        for name, table in (("factor", stored), ("shrink", (1 / stored.float()).to(dtype))):
            values = writer.constant(f"{leader}.input.{name}s", table)
            chosen = writer.node("Gather", [values, groups], f"{leader}.input.{name}_of", x, groups.shape)
            shape = [*groups.shape, *[1] * len(axes)]
            writer.node("Unsqueeze", [chosen, where], f"{leader}.input.{name}", x, shape)
        shrink = writer.values[f"{leader}.input.shrink"]
        x = writer.node("Mul", [x, shrink], f"{leader}.input.evened", x)
    rule = layer.rule
    assert rule is not None
    if scaling.amax is None:
        return x
    return _codes_and_back(writer, f"{leader}.input", x, rule.activation, scaling.amax)


def _multiply_after(writer: _Writer, layer: str, product: Any, leader: str) -> None:
    output = product.outputs[0]
    factor = writer.values[f"{leader}.input.factor"]
    users = list(output.uses())
    widened = writer.node("Mul", [output, factor], f"{layer}.widened", output)
    for node, index in users:
        node.replace_input_with(index, widened)
    assert not output.is_graph_output()


def _codes_and_back(writer: _Writer, name: str, x: Any, kind: str, amax: float) -> Any:
    """QuantizeLinear and DequantizeLinear with one static scale; zero is code 0."""
    import onnx_ir

    scale = stored_scale(torch.tensor(amax / LARGEST_CODE[kind]), _torch_dtype(x))
    step = writer.constant(f"{name}.scale", scale)
    zero = writer.constant(f"{name}.zero_point", torch.zeros((), dtype=_ACTIVATION_TYPES[kind]))
    codes = writer.node("QuantizeLinear", [x, step, zero], f"{name}.codes", x)
    codes.type = onnx_ir.TensorType(zero.dtype)
    return writer.node("DequantizeLinear", [codes, step, zero], f"{name}.dequantized", x)


def _quantised_weight(
    writer: _Writer,
    layer: LayerPlan,
    multiplier: Tensor | None,
    read: Callable[[str], Tensor],
    dtype: onnx_ir.DataType,
) -> Any:
    """The dequantised weight [K, N] of `dtype`: codes and scales are made when the file is written."""
    import onnx_ir

    rule = layer.rule
    assert rule is not None
    kind = rule.weight
    assert kind != "none"
    name = f"{layer.name}.weight"
    like = writer.graph.initializers[name]
    assert like.shape is not None
    outputs, inputs = like.shape.numpy()
    scale_dtype = _TORCH_OF[dtype.name]

    def quantise() -> QuantisedWeight:
        weight = read(layer.name)
        if multiplier is not None:
            weight = weight / multiplier
        return quantise_weight(
            weight, kind, rule.granularity, rule.block_size, scale_dtype=scale_dtype, name=name
        )

    def part(field: str) -> Tensor:
        found: Tensor = getattr(writer.quantised(name, quantise), field)
        return found.T if found.ndim == 2 else found

    types = onnx_ir.DataType
    code_type = {
        "int8": types.INT8,
        "fp8_e4m3": types.FLOAT8E4M3FN,
        "int4": types.INT4,
        "nvfp4": types.FLOAT4E2M1,
    }[kind]
    scale_shape: list[int] = {"tensor": [], "channel": [outputs]}.get(
        rule.granularity, [inputs // (rule.block_size or 1), outputs]
    )
    codes = writer.lazy(f"{name}.codes", lambda: part("codes"), [inputs, outputs], code_type)
    scale_type = types.FLOAT8E4M3FN if kind == "nvfp4" else dtype
    scale = writer.lazy(f"{name}.scale", lambda: part("scale"), scale_shape, scale_type)
    attributes: dict[str, Any] = {"axis": 1} if rule.granularity == "channel" else {}
    if rule.granularity == "block":
        attributes = {"axis": 0, "block_size": rule.block_size}
    if kind == "nvfp4":
        common = writer.lazy(f"{name}.global_scale", lambda: part("global_scale"), [], dtype)
        scale = writer.node("DequantizeLinear", [scale, common], f"{name}.block_scale", like, scale_shape)
    parts = [codes, scale]
    if kind == "int8":
        # ONNX Runtime asks for one a channel when it moves int8 weights to uint8 (session.x64quantprecision).
        zero = torch.zeros(scale_shape, dtype=torch.int8)
        parts.append(writer.constant(f"{name}.zero_point", zero))
    return writer.node(
        "DequantizeLinear", parts, f"{name}.dequantized", like, [inputs, outputs], **attributes
    )


_TORCH_OF = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


def _torch_dtype(value: Any) -> torch.dtype:
    return _TORCH_OF[value.dtype.name]


def _timestep_group(writer: _Writer, quantisation: Quantisation) -> Any:
    """int64 [B]: the group of each video's timestep, from a table of all timesteps."""
    statistics = quantisation.statistics
    assert statistics is not None
    timestep = next(value for value in writer.graph.inputs if value.name == "timestep")
    starts = torch.tensor(statistics.groups)
    groups = torch.bucketize(torch.arange(TRAIN_TIMESTEPS), starts, right=True) - 1
    table = writer.constant("timestep_groups", groups)
    return writer.node("Gather", [table, timestep], "timestep_group", timestep)


def _quantise_attention(writer: _Writer, name: str, kind: str, ranges: dict[str, float]) -> None:
    """Codes for the four operands of both products: queries, keys, probabilities, values."""
    scores = _next(_next_of(writer, f"{name}.norm_q.weight"), "MatMul")
    attended = _next(_next(scores, "Softmax"), "MatMul")
    for index, operand in enumerate(("query", "key")):
        value = scores.inputs[index]
        # torch multiplies both operands with the root of 1 / √D before their product.
        amax = ranges[operand] * _constant_factor(value)
        codes = _codes_and_back(writer, f"{name}.{operand}", value, kind, amax or 1.0)
        scores.replace_input_with(index, codes)
    probabilities = _codes_and_back(writer, f"{name}.probability", attended.inputs[0], kind, 1.0)
    attended.replace_input_with(0, probabilities)
    value = _codes_and_back(writer, f"{name}.value", attended.inputs[1], kind, ranges["value"] or 1.0)
    attended.replace_input_with(1, value)


def _next_of(writer: _Writer, initialiser: str) -> Any:
    return next(iter(writer.graph.initializers[initialiser].uses()))[0]


def _next(node: Any, operator: str) -> Any:
    """The nearest node of an operator downstream of `node`."""
    front = [node]
    while front:
        front = [user for each in front for output in each.outputs for user, _ in output.uses()]
        for user in front:
            if user.op_type == operator:
                return user
    raise AssertionError(f"no {operator} follows {node.name}")


def _constant_factor(value: Any) -> float:
    """c of a value that is Mul(x, c) with a constant c of one element; 1 for any other."""
    producer = value.producer()
    if producer is None or producer.op_type != "Mul":
        return 1.0
    tensor = producer.inputs[1].const_value
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else 1.0
