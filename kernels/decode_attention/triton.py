"""Attention of one query over a cache: the slots are shared out to programs, then their parts are joined.

Axes: B sequences, H query heads, G heads of keys and values, R = H/G query heads that share one of those,
S slots, D head size. A program takes one head of keys and values and one split of the slots in use, with all
R queries: keys and values are read once, for the attention and for the products with the direction (online
softmax, arXiv 1805.02867; splits as in Flash-Decoding). Softmax is in powers of two: log2(e) is in `factor`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteus_deploy.kernels.launch import LaunchConfig, launch, power_of_two
from proteus_deploy.kernels.triton_parts import multiply_add

_PROGRAMS = 512  # wanted at least: about four for each multiprocessor of a large GPU
_SPLIT_SLOTS = 64  # fewest that are worth a program
_MAX_SPLITS = 32  # whose parts the joining kernel holds at a time
_DOT = 16  # least rows and columns of a product on tensor cores


@triton.jit
def raised(top):
    """What exponents are taken from: the largest one so far, or 0 where no slot was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def nothing_yet(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Largest exponent, sum and result before the first slot: of each row, or of one row's BLOCK_N lanes."""
    LANES: tl.constexpr = BLOCK_N if ROWS == 1 else ROWS
    top = tl.full([LANES], float("-inf"), tl.float32)
    return top, tl.zeros([LANES], tl.float32), tl.zeros([LANES, BLOCK_D], tl.float32)


@triton.jit
def attend_alone(q, k, v, seen, factor, top, total, attended):
    """One query [1, BLOCK_D]: each of BLOCK_N lanes keeps a softmax of its own, so none waits for another.

    top, total [BLOCK_N]; attended [BLOCK_N, BLOCK_D].
    """
    exponents = tl.sum(k.to(tl.float32) * q.to(tl.float32), axis=1) * factor
    exponents = tl.where(seen, exponents, float("-inf"))
    new_top = tl.maximum(top, exponents)
    weights = tl.exp2(exponents - raised(new_top))
    shrink = tl.exp2(top - raised(new_top))
    attended = attended * shrink[:, None] + weights[:, None] * v.to(tl.float32)
    return new_top, total * shrink + weights, attended


@triton.jit
def join_lanes(top, total, attended):
    """The softmaxes of the lanes as that of one row: [1], [1], [1, BLOCK_D]."""
    best = tl.max(top, axis=0)
    shrink = tl.exp2(top - raised(best))
    attended = tl.sum(attended * shrink[:, None], axis=0)[None, :]
    return best + tl.zeros([1], tl.float32), tl.sum(total * shrink, axis=0)[None], attended


@triton.jit
def attend_together(q, k, v, seen, factor, top, total, attended, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries [ROWS, BLOCK_D] that share keys and values; top, total [ROWS], attended [ROWS, BLOCK_D]."""
    exponents = multiply_add(q, tl.trans(k), tl.zeros([ROWS, BLOCK_N], tl.float32)) * factor
    exponents = tl.where(seen[None, :], exponents, float("-inf"))
    new_top = tl.maximum(top, tl.max(exponents, axis=1))
    weights = tl.exp2(exponents - raised(new_top)[:, None])
    shrink = tl.exp2(top - raised(new_top))
    attended = multiply_add(weights.to(v.dtype), v, attended * shrink[:, None])
    return new_top, total * shrink + tl.sum(weights, axis=1), attended


@triton.jit
def clear_behind(products, end, slots, split, splits, BLOCK_N: tl.constexpr):
    """Zeros for this split's share of the slots that aren't in use."""
    share = tl.cdiv(slots - end, splits)
    begin = end + split * share
    stop = tl.minimum(begin + share, slots)
    for start in range(begin, stop, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        tl.store(products + slot, tl.zeros([BLOCK_N], tl.float32), mask=slot < stop)


@triton.jit
def decode_attention_kernel(
    query, keys, values, length, direction, mask, tops, totals, parts, products,
    end, slots, splits, factor,
    q_b, q_h, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    direction_b, direction_h, direction_d, mask_b, mask_s,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    HAS_LENGTH: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DIRECTION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the R queries of one head of keys and values, over one split of the slots in use.

    tops, totals [B, H, splits] and parts [B, H, splits, D]: softmax and result of the split, not divided.
    products [B, G, S]: values times direction, 0 behind the length. ROWS: 1, or R padded for tensor cores.
    """
    # 64-bit: sequences times heads times slots times size passes 2^31 for large batches.
    shared = tl.program_id(0).to(tl.int64)
    sample, group = shared // G, shared % G
    split = tl.program_id(1)
    if HAS_LENGTH:
        end = tl.maximum(0, tl.minimum(tl.load(length + sample), end))
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
    begin = split * share
    stop = tl.minimum(begin + share, end)
    row, d, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = d < D
    real = (row < R)[:, None] & inside[None, :]
    at = sample * q_b + (group * R + row)[:, None] * q_h + d[None, :] * q_d
    q = tl.load(query + at, mask=real, other=0.0)
    first = begin.to(tl.int64)
    keys += sample * k_b + group * k_h + first * k_s + column[:, None] * k_s + d[None, :] * k_d
    values += sample * v_b + group * v_h + first * v_s + column[:, None] * v_s + d[None, :] * v_d
    if HAS_DIRECTION:
        products += shared * slots
        at = sample * direction_b + group * direction_h + d * direction_d
        along = tl.load(direction + at, mask=inside, other=0.0).to(tl.float32)
        clear_behind(products, end, slots, split, splits, BLOCK_N)
    top, total, attended = nothing_yet(ROWS, BLOCK_D, BLOCK_N)
    for start in range(begin, stop, BLOCK_N):
        slot = start + column
        present = slot < stop
        tile = present[:, None] & inside[None, :]
        k = tl.load(keys, mask=tile, other=0.0)
        v = tl.load(values, mask=tile, other=0.0)
        seen = present
        if HAS_MASK:
            seen = present & (tl.load(mask + sample * mask_b + slot * mask_s, mask=present, other=0) != 0)
        if ROWS == 1:
            top, total, attended = attend_alone(q, k, v, seen, factor, top, total, attended)
        else:
            top, total, attended = attend_together(q, k, v, seen, factor, top, total, attended, ROWS, BLOCK_N)
        if HAS_DIRECTION:
            tl.store(products + slot, tl.sum(v.to(tl.float32) * along[None, :], axis=1), mask=present)
        keys += BLOCK_N * k_s
        values += BLOCK_N * v_s
    if ROWS == 1:
        top, total, attended = join_lanes(top, total, attended)
    part = (sample * G * R + group * R + row) * splits + split
    tl.store(tops + part, top, mask=row < R)
    tl.store(totals + part, total, mask=row < R)
    tl.store(parts + part[:, None] * D + d[None, :], attended, mask=real)


@triton.jit
def join_splits_kernel(
    tops, totals, parts, products, out, similarity, splits, slots,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: a head's result from its splits, or, behind the heads, BLOCK_S products summed over G."""
    sample = tl.program_id(1).to(tl.int64)
    task = tl.program_id(0)
    if task < H:
        p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
        head = sample * H + task
        part = head * splits + p
        top = tl.load(tops + part, mask=p < splits, other=float("-inf"))
        total = tl.load(totals + part, mask=p < splits, other=0.0)
        inside = (p < splits)[:, None] & (d < D)[None, :]
        attended = tl.load(parts + part[:, None] * D + d[None, :], mask=inside, other=0.0)
        shrink = tl.exp2(top - raised(tl.max(top, axis=0)))
        total = tl.sum(total * shrink, axis=0)
        attended = tl.sum(attended * shrink[:, None], axis=0)
        # No slot seen: zeros over one. Any that was seen makes the sum at least one.
        attended = attended / tl.where(total == 0.0, 1.0, total)
        tl.store(out + head * D + d, attended.to(out.dtype.element_ty), mask=d < D)
    else:
        slot = (task - H) * BLOCK_S + tl.arange(0, BLOCK_S)
        summed = tl.zeros([BLOCK_S], tl.float32)
        for group in range(G):
            at = (sample * G + group) * slots + slot
            summed += tl.load(products + at, mask=slot < slots, other=0.0)
        tl.store(similarity + sample * slots + slot, summed, mask=slot < slots)


def splits_for(shared_heads: int, slots: int) -> int:
    """In how many splits the slots go, by shapes alone: equal shapes give equal sums in every process."""
    wanted = -(-_PROGRAMS // max(1, shared_heads))
    return max(1, min(wanted, -(-slots // _SPLIT_SLOTS), _MAX_SPLITS))


def slot_space(head_size: int, rows: int, dtype: torch.dtype) -> tuple[LaunchConfig, ...]:
    """Blocks of slots: how many values of keys, and as many of values, a program holds at a time."""
    block_d = max(power_of_two(head_size), 1 if rows == 1 else _DOT)

    def config(held: int, warps: int, stages: int, least: int, most: int) -> LaunchConfig:
        n = min(most, max(held // block_d, least))
        return LaunchConfig((("BLOCK_N", n), ("BLOCK_D", block_d)), warps, stages, 99)

    if rows == 1:
        points = [
            config(*point, 8, 128) for point in ((4096, 4, 1), (2048, 2, 1), (4096, 8, 1), (8192, 8, 1))
        ]
    elif dtype.itemsize == 4:  # products run outside the tensor cores, from registers
        points = [config(*point, _DOT, min(32, block_d)) for point in ((2048, 8, 2), (1024, 4, 2))]
    else:
        points = [
            config(*point, _DOT, min(64, block_d)) for point in ((4096, 4, 2), (4096, 8, 3), (2048, 4, 3))
        ]
    return tuple(dict.fromkeys(points))


def join_space(head_size: int, splits: int) -> tuple[LaunchConfig, ...]:
    """A head's splits lie in one tile; blocks of slots whose products are summed."""
    fixed = (("BLOCK_D", power_of_two(head_size)), ("BLOCK_P", power_of_two(splits)))
    return tuple(
        LaunchConfig((*fixed, ("BLOCK_S", n)), warps, 1, 99) for n, warps in ((128, 4), (64, 2), (256, 8))
    )


def forward(
    query: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, end: int, direction: Tensor | None,
    mask: Tensor | None, scale: float, per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query [B, H, D], keys, values [B, G, S, D] -> [B, H, D] in the dtype of `query`, and the products.

    end: slots in use, or with a `length` the most of them. Products are float32 [B, S], or [B, G, S] with
    per_head; without a direction an empty tensor.
    """
    batch, heads, size = query.shape
    groups, slots = keys.shape[1:3]
    rows = heads // groups
    splits = splits_for(batch * groups, slots)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    out = empty(batch, heads, size, dtype=query.dtype)
    products = empty(batch, groups, slots) if direction is not None else empty(0)
    summed = direction is not None and not per_head
    similarity = empty(batch, slots) if summed else products
    if batch * heads == 0:
        return out, similarity
    tops, totals = empty(batch, heads, splits), empty(batch, heads, splits)
    parts = empty(batch, heads, splits, size)
    # Stand-ins are not read.
    along, seen = query if direction is None else direction, query if mask is None else mask
    launch(
        decode_attention_kernel,
        lambda _: (batch * groups, splits),
        {
            "query": query, "keys": keys, "values": values,
            "length": query if length is None else length.contiguous(), "direction": along, "mask": seen,
            "tops": tops, "totals": totals, "parts": parts, "products": products,
            "end": end, "slots": slots, "splits": splits, "factor": scale * math.log2(math.e),
            "G": groups, "R": rows, "D": size, "HAS_LENGTH": length is not None, "HAS_MASK": mask is not None,
            "HAS_DIRECTION": direction is not None,
            "ROWS": 1 if rows == 1 else max(power_of_two(rows), _DOT),
            **{f"q_{axis}": query.stride(i) for i, axis in enumerate("bhd")},
            **{f"k_{axis}": keys.stride(i) for i, axis in enumerate("bhsd")},
            **{f"v_{axis}": values.stride(i) for i, axis in enumerate("bhsd")},
            **{f"direction_{axis}": along.stride(i) for i, axis in enumerate("bhd")},
            **{f"mask_{axis}": seen.stride(i) for i, axis in enumerate("bs")},
        },
        slot_space(size, rows, query.dtype),
        # Not the length: it is another one at every step.
        key=("splits",),
    )  # fmt: skip
    launch(
        join_splits_kernel,
        lambda meta: (heads + (triton.cdiv(slots, meta["BLOCK_S"]) if summed else 0), batch),
        {
            "tops": tops, "totals": totals, "parts": parts, "products": products, "out": out,
            "similarity": similarity, "splits": splits, "slots": slots, "H": heads, "G": groups, "D": size,
        },
        join_space(size, splits),
        key=("splits",),
    )  # fmt: skip
    return out, similarity
