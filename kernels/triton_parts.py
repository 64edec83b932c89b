"""Device functions that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(a, b, total):
    """total + a b, multiplied in the operands' dtype and summed in float32 (float32 operands: no TF32)."""
    if INTERPRETED:
        # Triton 3.7's interpreter keeps bfloat16 as its bits and would multiply those as whole numbers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def copy_rows(
    source, source_d, target, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # source, target: pointers to the rows' first elements; target is contiguous in d
    """Copy rows of D elements, BLOCK_D at a time."""
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (d < D)[None, :]
        x = tl.load(source[:, None] + d[None, :] * source_d, mask=mask, other=0.0)
        tl.store(target[:, None] + d[None, :], x, mask=mask)


@triton.jit
def layer_norm(x, inside, eps, D: tl.constexpr, AXIS: tl.constexpr):
    """Norm without affine along the last axis AXIS of float32 `x`, whose elements off `inside` are zero."""
    mean = tl.expand_dims(tl.sum(x, axis=AXIS) / D, AXIS)
    away = tl.where(inside, x - mean, 0.0)
    variance = tl.expand_dims(tl.sum(away * away, axis=AXIS) / D, AXIS)
    return away / tl.sqrt(variance + eps)


@triton.jit
def modulated_layer_norm(x, weight, bias, shift, scale, d, eps, D: tl.constexpr):
    """LN(x) * (1 + scale) + shift for float32 rows x [rows, BLOCK_D]; the rest point to vectors of D."""
    inside = d < D
    gain = 1.0 + tl.load(scale + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    offset = b * gain + tl.load(shift + d, mask=inside, other=0.0).to(tl.float32)
    return layer_norm(x, inside[None, :], eps, D, 1) * (w * gain)[None, :] + offset[None, :]
