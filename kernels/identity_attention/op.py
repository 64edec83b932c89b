"""Fused identity attention as `torch.library` ops, with gradients, for `torch.compile` and `torch.export`.

    proteus_deploy::identity_attention            folded inputs -> hidden with the gated residual
    proteus_deploy::identity_attention_backward   its gradients

The gate is a tensor that the kernel reads, so one compiled graph serves every step of a schedule, and a zero
gate turns the work into a copy. Axes: B batch, N tokens, d width, H heads, Q identity tokens, C = H*Q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.kernels.identity_attention.reference import (
    FoldedIdentity,
    fold_identity_attention,
    folded_identity_attention,
    identity_attention,
)
from proteus_deploy.kernels.launch import (
    Backend,
    check_backend,
    check_dtype,
    check_shape,
    load_kernels,
    power_of_two,
)

_NAME = "identity attention"
_MAX_COLUMNS = 1024  # two groups of 512: more accumulators no register file holds
_ARGUMENTS = "Tensor hidden, Tensor A, Tensor a0, Tensor Bm, Tensor gate, int heads, float eps"


def fused_identity_attention(
    hidden: Tensor,
    folded: FoldedIdentity,
    *,
    gate: Tensor,
    heads: int,
    eps: float = 1e-5,
    backend: Backend = "triton",
) -> Tensor:
    """`folded_identity_attention` in one kernel, differentiable in hidden, A, a0, Bm and gate.

    hidden [B, N, d] float32, bfloat16 or float16, any strides; folded as `fold_identity_attention` gives it,
    for B identities or one; gate: one value on the same device, any float dtype. Products run in the dtype
    of `hidden`, to which A and Bm are rounded; sums are float32. Returns [B, N, d], contiguous.

    backend="triton" needs CUDA tensors (or TRITON_INTERPRET=1) and raises BackendError otherwise;
    backend="reference" runs the plain form anywhere. Raises InputError for shapes that don't belong together.
    """
    check_backend(backend)
    if backend == "reference":
        return folded_identity_attention(hidden, folded, gate=gate, heads=heads, eps=eps)
    result: Tensor = torch.ops.proteus_deploy.identity_attention(hidden, *folded, gate, heads, eps)
    return result


def fused_identity_attention_unfolded(
    hidden: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    gate: Tensor,
    heads: int,
    eps: float = 1e-5,
    backend: Backend = "triton",
) -> Tensor:
    """`identity_attention` with the fused kernel: folds (what about 2*Q tokens cost), then as above.

    Same arguments as the reference. Folding is exact and differentiable, so gradients reach key, value and
    every weight. A caller whose identity stays the same over many steps folds once instead.
    """
    check_backend(backend)
    weights = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "query_weight": query_weight,
        "out_weight": out_weight,
    }
    if backend == "reference":
        return identity_attention(hidden, key, value, gate=gate, heads=heads, eps=eps, **weights)
    folded = fold_identity_attention(key, value, heads=heads, **weights)
    return fused_identity_attention(hidden, folded, gate=gate, heads=heads, eps=eps)


@torch.library.custom_op(
    "proteus_deploy::identity_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _forward_op(
    hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float
) -> Tensor:
    _check(hidden, A, a0, Bm, gate, heads)
    kernels = load_kernels("proteus_deploy.kernels.identity_attention.triton")
    result: Tensor = kernels.forward(hidden, A, a0, Bm, gate, heads, eps)
    return result


@_forward_op.register_fake
def _forward_fake(
    hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float
) -> Tensor:
    del eps
    _check(hidden, A, a0, Bm, gate, heads)
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


@torch.library.custom_op(
    "proteus_deploy::identity_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, bool gate_grad, bool small_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad: Tensor, hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float,
    gate_grad: bool, small_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(hidden, A, a0, Bm, gate, heads)
    check_shape(_NAME, "grad", grad, *hidden.shape)
    kernels = load_kernels("proteus_deploy.kernels.identity_attention.triton_backward")
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.backward(
        grad, hidden, A, a0, Bm, gate, heads, eps, gate_grad=gate_grad, small_grad=small_grad
    )
    return result


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int, eps: float,
    gate_grad: bool, small_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    del grad, heads, eps, gate_grad
    small = ((x.shape if small_grad else (0,), x) for x in (A, a0, Bm))
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        *(torch.empty(shape, dtype=x.dtype, device=x.device) for shape, x in small),
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    grads = torch.ops.proteus_deploy.identity_attention_backward(
        grad, *ctx.saved_tensors, ctx.heads, ctx.eps, needed[4], any(needed[1:4])
    )
    return (*(value if need else None for value, need in zip(grads, needed, strict=True)), None, None)


_forward_op.register_autograd(_differentiate, setup_context=_save_inputs)


def _check(hidden: Tensor, A: Tensor, a0: Tensor, Bm: Tensor, gate: Tensor, heads: int) -> None:
    check_dtype(_NAME, hidden=hidden, A=A, a0=a0, Bm=Bm, gate=gate)
    check_shape(_NAME, "hidden", hidden, None, None, None)
    check_shape(_NAME, "A", A, None, hidden.shape[2], None)
    identities, width, columns = A.shape
    # A size that torch.export keeps dynamic has no hash, and a comparison with one would rule one out for it.
    shared = type(identities) is int and identities == 1
    if not shared and identities != hidden.shape[0] and identities != 1:
        raise InputError(
            f"{_NAME}: A has {identities} identities for {hidden.shape[0]} samples; give one, or one for each"
        )
    if heads < 1 or columns % heads or columns == 0:
        raise InputError(f"{_NAME}: A has {columns} columns, which {heads} heads can't share equally")
    padded = power_of_two(heads) * power_of_two(columns // heads)
    if padded > _MAX_COLUMNS:
        raise InputError(
            f"{_NAME}: {heads} heads of {columns // heads} identity tokens make {padded} columns, padded to "
            f"powers of two; the kernel holds {_MAX_COLUMNS}. Use backend='reference'"
        )
    check_shape(_NAME, "a0", a0, identities, 1, columns)
    check_shape(_NAME, "Bm", Bm, identities, columns, width)
    if gate.numel() != 1:
        raise InputError(f"{_NAME}: gate has {gate.numel()} values, expected one")
