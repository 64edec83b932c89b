"""Float16 graphs of the autoencoder: a norm whose squares pass float16's range gives numbers, not NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from proteus_deploy.export.half_norms import widen_norms

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")


def norm_model(kind: int) -> Any:
    """x [B, 4, 64] -> InstanceNormalization -> InstanceNormalization -> y."""
    helper = onnx.helper
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("InstanceNormalization", ["x", "scale", "bias"], ["middle"], epsilon=1e-5),
        helper.make_node("InstanceNormalization", ["middle", "scale", "bias"], ["y"], epsilon=1e-5),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.full(4, fill, helper.tensor_dtype_to_np_dtype(kind)), name)
        for name, fill in (("scale", 2.0), ("bias", 0.5))
    ]
    ends = [value("x", kind, ["B", 4, 64])], [value("y", kind, ["B", 4, 64])]
    body = helper.make_graph(nodes, "norms", *ends, constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: Any, x: Any) -> Any:
    """y, computed with NumPy in the types that the graph names."""
    from onnx.reference import ReferenceEvaluator

    outputs: Any = ReferenceEvaluator(model).run(None, {"x": x})
    return outputs[0]


def test_large_activations_stay_finite() -> None:

    x = (1000 * np.random.default_rng(0).standard_normal((1, 4, 64))).astype(np.float16)
    model = norm_model(onnx.TensorProto.FLOAT16)
    with np.errstate(over="ignore", invalid="ignore"):
        plain = run(model, x)
    assert not np.abs(plain - 0.5).max() > 1, "squares of 1000 overflow: the norm says that nothing varies"
    converted = ir.serde.deserialize_model(model)
    assert widen_norms(converted) == 2
    widened = ir.serde.serialize_model(converted)
    onnx.checker.check_model(widened, full_check=True)
    found = run(widened, x)
    assert found.dtype == np.float16

    def norm(value: Tensor) -> Tensor:
        full = torch.full((4,), 2.0), torch.full((4,), 0.5)
        return nn.functional.instance_norm(value, weight=full[0], bias=full[1])

    once = norm(torch.from_numpy(x).float()).half().float()  # the graph hands it on in float16
    want = norm(once).numpy()
    # Two roundings to float16, each at most 2^-11 of values up to 8.
    np.testing.assert_allclose(found.astype(np.float32), want, atol=2 * 8 * 2**-11)


def test_other_precisions_are_left_alone() -> None:
    assert widen_norms(ir.serde.deserialize_model(norm_model(onnx.TensorProto.FLOAT))) == 0
