"""Attention of one new query over a cache as a `torch.library` op: proteus_deploy::decode_attention.

Axes: B sequences, H query heads, G heads of keys and values, S slots, D head size. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.decode_attention.reference import decode_attention
from proteus_deploy.kernels.launch import Backend, check_backend, check_dtype, check_shape, load_kernels

MAX_HEAD_SIZE = 256  # larger tiles don't stay in registers

_NAME = "decode attention"


def fused_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    direction: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    per_head: bool = False,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor | None]:
    """softmax(query keys^T scale) values, and values · direction, from one pass over keys and values.

    query [B, H, D]; keys, values [B, G, S, D], all float32, bfloat16 or float16 alike, any strides (slices of
    a longer buffer need no copy); H a multiple of G; D at most 256. scale: None is 1/√D.

    length: slots in use, a number from 0 to S, or int32 [B], which is read on the device and not checked
    (above S it is S, below 0 it is 0). mask: bool [B, S], True is seen. Slots behind the length may hold
    anything; masked ones have to hold finite numbers. A query that sees no slot gets zeros.

    direction: [B, G, D], float32, bfloat16 or float16. Returns the attended values [B, H, D] in the dtype of
    `query`, and the products of the slots' values with the direction, float32 [B, S], summed over G (with
    per_head [B, G, S], not summed), of masked slots as well, 0 behind the length; None without a direction.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1) and raises BackendError otherwise;
    backend="reference" runs the plain form anywhere. Raises InputError for shapes that don't belong together,
    and where a gradient would be wanted: there is no backward pass.
    """
    check_backend(backend)
    if backend == "reference":
        return decode_attention(query, keys, values, length, direction, mask, scale, per_head=per_head)
    given = [x for x in (query, keys, values, direction) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise InputError(
            f"{_NAME}: a gradient is asked for, and the kernel has a forward pass alone; run it under "
            "torch.no_grad(), or take backend='reference'"
        )
    lengths, end = (length, keys.shape[2]) if isinstance(length, Tensor) else (None, length)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out, similarity = torch.ops.proteus_deploy.decode_attention(
        query, keys, values, lengths, end, direction, mask, factor, per_head
    )
    return out, None if direction is None else similarity


@torch.library.custom_op(
    "proteus_deploy::decode_attention",
    mutates_args=(),
    # Without a direction the second result is empty: an op can't return None.
    schema="(Tensor query, Tensor keys, Tensor values, Tensor? length, SymInt end, Tensor? direction, "
    "Tensor? mask, float scale, bool per_head) -> (Tensor, Tensor)",
)
def _forward_op(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, end: int, direction: Tensor | None,
    mask: Tensor | None, scale: float, per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, keys, values, length, end, direction, mask)
    kernels = load_kernels("proteus_deploy.kernels.decode_attention.triton")
    result: tuple[Tensor, Tensor] = kernels.forward(
        query, keys, values, length, end, direction, mask, scale, per_head
    )
    return result


@_forward_op.register_fake
def _forward_fake(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, end: int, direction: Tensor | None,
    mask: Tensor | None, scale: float, per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    del scale
    _check(query, keys, values, length, end, direction, mask)
    batch, groups, slots, _ = keys.shape
    shape = (batch, groups, slots) if per_head else (batch, slots)
    similarity = query.new_empty(shape if direction is not None else (0,), dtype=torch.float32)
    return torch.empty(query.shape, dtype=query.dtype, device=query.device), similarity


def _check(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, end: int, direction: Tensor | None,
    mask: Tensor | None,
) -> None:  # fmt: skip
    check_dtype(_NAME, query=query, keys=keys, values=values)
    check_shape(_NAME, "query", query, None, None, None)
    batch, heads, size = query.shape
    check_shape(_NAME, "keys", keys, batch, None, None, size)
    check_shape(_NAME, "values", values, *keys.shape)
    if not query.dtype == keys.dtype == values.dtype:
        raise InputError(
            f"{_NAME}: query is {query.dtype}, keys {keys.dtype} and values {values.dtype}; convert them to "
            "one dtype"
        )
    groups, slots = keys.shape[1:3]
    if groups < 1 or heads % groups:
        raise InputError(
            f"{_NAME}: {heads} query heads can't share {groups} heads of keys and values; their number has "
            "to be a multiple"
        )
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise InputError(
            f"{_NAME}: the head size is {size}; the kernel takes 1 to {MAX_HEAD_SIZE}. Use "
            "backend='reference' for a larger one"
        )
    if not 0 <= end <= slots:
        raise InputError(f"{_NAME}: the length is {end}; of {slots} slots, 0 to {slots} can be in use")
    if length is not None:
        check_shape(_NAME, "length", length, batch)
        _check_kind("length", length, torch.int32)
    if direction is not None:
        check_dtype(_NAME, direction=direction)
        check_shape(_NAME, "direction", direction, batch, groups, size)
    if mask is not None:
        check_shape(_NAME, "mask", mask, batch, slots)
        _check_kind("mask", mask, torch.bool)


def _check_kind(argument: str, tensor: Tensor, kind: torch.dtype) -> None:
    if tensor.dtype != kind:
        have, want = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, kind))
        raise InputError(f"{_NAME}: {argument} is {have}, and has to be {want}; convert it")
