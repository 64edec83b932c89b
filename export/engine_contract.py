"""What an engine takes and gives, read from its network and checked against the stage table.

A finished engine can be inspected only on its GPU, so the contract is written down at build time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from proteus_deploy.errors import BundleError, InputError
from proteus_deploy.runtime.tensorrt_api import DTYPES
from proteus_deploy.stages import Graph, StageTable, TensorSpec

# First compute capability that has the type.
_FIRST_CAPABILITY = {"bf16": 80, "int4": 80, "fp8": 89, "fp4": 120}
_NUMERIC = {"fp32", "fp16", "bf16", "fp8", "fp4", "e8m0", "int8", "int4"}


def read_contract(network: Any, graph: Graph, table: StageTable) -> dict[str, Any]:
    """Inputs and outputs (-1: dynamic), optimisation profile, layers and layer outputs by kind, as JSON."""
    layers: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name.lower()] += 1
        for output in (layer.get_output(position) for position in range(layer.num_outputs)):
            if output is not None and (name := _dtype(output)) in _NUMERIC:
                precisions[name] += 1
    profile = table.profile(graph)
    return {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "profile": {
            name: {which: list(shape) for which, shape in shapes.items()} for name, shapes in profile.items()
        },
        "layers": dict(sorted(layers.items())),
        "precisions": dict(sorted(precisions.items())),
    }


def check_contract(contract: Mapping[str, Any], graph: Graph, table: StageTable, dtype: str) -> None:
    """Raises BundleError that names the first input or output which differs from the stage table."""
    for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
        found = {tensor["name"]: tensor for tensor in contract[f"{kind}s"]}
        expected = {spec.name for spec in specs}
        for name in sorted(found.keys() ^ expected):
            side = "lacks" if name in expected else "has an undeclared"
            raise BundleError(
                f"graph {graph.name!r}: the ONNX file {side} {kind} {name!r}; export the bundle again"
            )
        for spec in specs:
            _check_tensor(f"graph {graph.name!r}, {kind} {spec.name!r}", found[spec.name], spec, table, dtype)


def check_precisions(contract: Mapping[str, Any], target: str) -> None:
    """Raises InputError when the graph holds numbers that the target's hardware doesn't have."""
    capability = int(target.removeprefix("sm"))
    for name, first in _FIRST_CAPABILITY.items():
        if name in contract["precisions"] and capability < first:
            other = "export with --dtype fp16" if name == "bf16" else "export with another --quantize recipe"
            raise InputError(
                f"the graph computes in {name}, which {target} doesn't have (sm{first} and later do); {other}"
            )


def _dtype(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return DTYPES.get(name, name.lower())


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": _dtype(tensor), "shape": list(tensor.shape)}


def _check_tensor(
    where: str, found: Mapping[str, Any], spec: TensorSpec, table: StageTable, dtype: str
) -> None:
    wanted = {"float": dtype, "float32": "fp32"}.get(spec.dtype, spec.dtype)
    if found["dtype"] != wanted:
        raise BundleError(f"{where}: the ONNX file has dtype {found['dtype']}, the stage table {wanted}")
    sizes = table.dims(spec)
    matches = len(sizes) == len(found["shape"]) and all(
        # -1 where a number is expected is harmless: the profile, or the inputs, pin it down.
        got in (size, -1)
        for got, size in zip(found["shape"], sizes, strict=True)
    )
    if not matches:
        raise BundleError(
            f"{where}: the ONNX file has shape {found['shape']}, the stage table {list(spec.axes)}, that is "
            f"{sizes} (-1: dynamic); export the bundle again"
        )
