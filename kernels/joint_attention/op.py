"""Attention over all joint tokens as a `torch.library` op: proteus_deploy::joint_attention. Forward only.

Axes: B batch, H heads, S joint tokens, D head size.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.joint_attention.quantised import Product, quantised_attention
from proteus_deploy.kernels.joint_attention.reference import attention
from proteus_deploy.kernels.launch import Backend, check_backend, check_dtype, check_shape, load_kernels

HEAD_SIZES = (32, 64, 128)  # powers of two that tensor cores take and registers hold

_NAME = "joint attention"


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, product: Product = "tokens", backend: Backend = "triton"
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V in one kernel. All [B, H, S, D] -> [B, H, S, D].

    float32, bfloat16 or float16, all three alike; any strides; D 32, 64 or 128. Returned in that dtype with
    the memory order [B, S, H, D] that the output projection wants. product: what queries and keys are
    multiplied in: "tokens", their own dtype; "int8" or "fp8", rounded as README.md says (an approximation).
    Weights and values are multiplied in the tokens' dtype; sums are float32.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1), "fp8" of sm_89 or newer, and raises
    BackendError otherwise; backend="reference" runs the plain form anywhere. Raises InputError for shapes
    that don't belong together, and where a gradient would be wanted: there is no backward pass.
    """
    check_backend(backend)
    _check_product(product)
    if backend == "reference":
        if product == "tokens":
            return attention(query, key, value)
        return quantised_attention(query, key, value, product)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise InputError(
            f"{_NAME}: a gradient is asked for, and the kernel has a forward pass alone; run it under "
            "torch.no_grad(), or train with PyTorch's own attention ('torch')"
        )
    result: Tensor = torch.ops.proteus_deploy.joint_attention(query, key, value, product)
    return result


@torch.library.custom_op(
    "proteus_deploy::joint_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, str product) -> Tensor",
)
def _forward_op(query: Tensor, key: Tensor, value: Tensor, product: str) -> Tensor:
    _check(query, key, value, product)
    kernels = load_kernels("proteus_deploy.kernels.joint_attention.triton")
    result: Tensor = kernels.forward(query, key, value, product)
    return result


@_forward_op.register_fake
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, product: str) -> Tensor:
    _check(query, key, value, product)
    batch, heads, tokens, size = query.shape
    return torch.empty((batch, tokens, heads, size), dtype=query.dtype, device=query.device).transpose(1, 2)


def _check_product(product: str) -> None:
    if product not in get_args(Product):
        raise InputError(f"{_NAME}: product {product!r} is unknown; there are {', '.join(get_args(Product))}")


def _check(query: Tensor, key: Tensor, value: Tensor, product: str) -> None:
    _check_product(product)
    check_dtype(_NAME, query=query, key=key, value=value)
    check_shape(_NAME, "query", query, None, None, None, None)
    check_shape(_NAME, "key", key, *query.shape)
    check_shape(_NAME, "value", value, *query.shape)
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"{_NAME}: query is {query.dtype}, key {key.dtype} and value {value.dtype}; convert them to "
            "one dtype"
        )
    if query.shape[3] not in HEAD_SIZES:
        raise InputError(
            f"{_NAME}: the head size is {query.shape[3]}; the kernel takes 32, 64 or 128. Use PyTorch's own "
            "attention ('torch'), or backend='reference', for another one"
        )
