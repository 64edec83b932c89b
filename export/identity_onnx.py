"""Identity attention as one ONNX node, for TensorRT's plugin of the same name, in place of a dozen.

    proteus_deploy::FusedIdentityAttention(hidden, A, sums, a0, Bm, gate) -> hidden with the gated residual

Axes: B batch, N tokens, d width, H heads, Q face tokens, C = H*Q columns; I identities, 1 or B.

| input  | shape     | dtype   | what                                                              |
|--------|-----------|---------|-------------------------------------------------------------------|
| hidden | [B, N, d] | T       | video tokens                                                      |
| A      | [I, C, d] | T       | folded query side, one row a column: the kernel reads it like this |
| sums   | [I, C]    | float32 | sum of each row of A: the norm's mean is taken off with it        |
| a0     | [I, 1, C] | T       | what the norm's bias adds to the scores                           |
| Bm     | [I, C, d] | T       | folded value side                                                 |
| gate   | [1]       | float32 | strength of the residual; 0 makes the node a copy                 |

T is float32, float16 or bfloat16. Attributes: heads and eps, each a list of one number. TensorRT reads a
plain number from a NumPy array of one element in a way that NumPy 2.4 refuses; a list stays an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from proteus_deploy.errors import InputError
from proteus_deploy.model.identity_attention import IdentityAttention

if TYPE_CHECKING:
    import onnx

    from proteus_deploy.model.networks import Network

DOMAIN = "proteus_deploy"
DOMAIN_VERSION = 1
OPERATOR = "FusedIdentityAttention"
OPERATOR_ID = f"{DOMAIN}::{OPERATOR}"
INPUTS = ("hidden", "A", "sums", "a0", "Bm", "gate")

_FLOAT32 = 1  # onnx.TensorProto.FLOAT
_ALWAYS_FLOAT32 = ("sums", "gate")


def fuse_identity_attention(network: Network) -> Network:
    """Make every identity attention of `network` one operation; weights and their names stay.

    Returns the same network. Raises InputError where it has none.
    """
    sites = [module for module in network.module.modules() if isinstance(module, IdentityAttention)]
    if not sites:
        raise InputError("this network has no identity attention to fuse")
    for site in sites:
        site.form = "triton"
    return network


def identity_translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export's `custom_translation_table`: the fused operation becomes the node above."""
    import onnxscript
    from onnxscript import values

    opset: Any = onnxscript.opset20
    node = values.Op(values.Opset(DOMAIN, DOMAIN_VERSION), OPERATOR, operator_schema())

    def translate(hidden: Any, A: Any, a0: Any, Bm: Any, gate: Any, heads: int, eps: float) -> Any:
        rows = opset.Transpose(A, perm=[0, 2, 1])  # folded away: A comes as a transpose of these rows
        last = opset.Constant(value_ints=[2])
        sums = opset.ReduceSum(opset.Cast(rows, to=_FLOAT32), last, keepdims=0)
        # The last three are read by TensorRT's parser: which plugin, and that it is compiled ahead of time.
        return node(
            hidden, rows, sums, a0, Bm, opset.Cast(gate, to=_FLOAT32), heads=[heads], eps=[eps],
            plugin_namespace=DOMAIN, plugin_version="1", aot=1,
        )  # fmt: skip

    return {torch.ops.proteus_deploy.identity_attention.default: translate}


def operator_schema() -> onnx.defs.OpSchema:
    """The node's schema. It is not registered: nothing outside of this module learns of it."""
    from onnx import defs

    schema, kinds = defs.OpSchema, defs.OpSchema.AttrType
    return schema(
        OPERATOR,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            schema.FormalParameter(name, "tensor(float)" if name in _ALWAYS_FLOAT32 else "T")
            for name in INPUTS
        ],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "of the tokens")],
        attributes=[
            schema.Attribute("heads", kinds.INTS),
            schema.Attribute("eps", kinds.FLOATS),
            schema.Attribute("plugin_namespace", kinds.STRING),
            schema.Attribute("plugin_version", kinds.STRING),
            schema.Attribute("aot", kinds.INT),
        ],
    )
