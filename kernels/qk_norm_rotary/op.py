"""Norm and rotary embedding of queries and keys as a `torch.library` op: proteus_deploy::qk_norm_rotary.

Axes: B batch, S joint tokens (L text tokens, then video), H heads, D head size. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.launch import Backend, check_backend, check_dtype, check_shape, load_kernels
from proteus_deploy.kernels.qk_norm_rotary.reference import qk_norm_rotary

_NAME = "QK norm and rotary embedding"
_MAX_HEAD_SIZE = 256  # larger tiles don't stay in registers


def fused_qk_norm_rotary(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rotary` in one launch. query, key [B, H, S, D] -> both, [B, H, S, D].

    float32, bfloat16 or float16, any strides (heads split from a projection need no copy); weights and
    biases [D]; cos, sin [S - L, D] of the video tokens, which come last. Computed in float32 and returned in
    the dtype of `query`, with the memory order [B, S, H, D] that the output projection wants.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1) and raises BackendError otherwise;
    backend="reference" runs the plain form anywhere. Raises InputError for shapes that don't belong together.
    """
    check_backend(backend)
    if backend == "reference":
        return qk_norm_rotary(
            query, key, query_weight=query_weight, query_bias=query_bias, key_weight=key_weight,
            key_bias=key_bias, cos=cos, sin=sin, eps=eps,
        )  # fmt: skip
    result: tuple[Tensor, Tensor] = torch.ops.proteus_deploy.qk_norm_rotary(
        query, key, query_weight, query_bias, key_weight, key_bias, cos, sin, eps
    )
    return result


@torch.library.custom_op(
    "proteus_deploy::qk_norm_rotary",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor query_weight, Tensor query_bias, Tensor key_weight, "
    "Tensor key_bias, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
)
def _forward_op(
    query: Tensor, key: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (query, key, query_weight, query_bias, key_weight, key_bias, cos, sin)
    _check(*tensors)
    kernels = load_kernels("proteus_deploy.kernels.qk_norm_rotary.triton")
    result: tuple[Tensor, Tensor] = kernels.forward(*tensors, eps)
    return result


@_forward_op.register_fake
def _forward_fake(
    query: Tensor, key: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del eps
    _check(query, key, query_weight, query_bias, key_weight, key_bias, cos, sin)
    batch, heads, tokens, size = query.shape
    first, second = (
        torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=query.device).transpose(1, 2)
        for _ in range(2)
    )
    return first, second


def _check(
    query: Tensor, key: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor,
) -> None:  # fmt: skip
    affine = {
        "query_weight": query_weight, "query_bias": query_bias,
        "key_weight": key_weight, "key_bias": key_bias,
    }  # fmt: skip
    check_dtype(_NAME, query=query, key=key, cos=cos, sin=sin, **affine)
    check_shape(_NAME, "query", query, None, None, None, None)
    check_shape(_NAME, "key", key, *query.shape)
    if query.dtype != key.dtype:
        raise InputError(f"{_NAME}: query is {query.dtype} and key {key.dtype}; convert one of them")
    size = query.shape[3]
    if size % 2 or not 2 <= size <= _MAX_HEAD_SIZE:
        raise InputError(
            f"{_NAME}: the head size is {size}; pairs need an even one, and the kernel takes 2 to "
            f"{_MAX_HEAD_SIZE}. Use backend='reference' for a larger one"
        )
    for name, vector in affine.items():
        check_shape(_NAME, name, vector, size)
    check_shape(_NAME, "cos", cos, None, size)
    check_shape(_NAME, "sin", sin, *cos.shape)
    if cos.shape[0] > query.shape[2]:
        raise InputError(
            f"{_NAME}: the tables have {cos.shape[0]} tokens and the query {query.shape[2]}; video tokens "
            "are the last of the joint sequence, so tables can't be longer"
        )
