"""How fast is each Triton kernel, against its plain form and against what the machine can do?

Every kernel is timed beside its reference, eager and compiled, in interleaved rounds at the published size
(or a small one, to rehearse). Its share of the floor is taken: the larger of its bytes by the measured copy
rate and its FLOPs by the measured product rate. Outputs are compared before anything is timed.

Axes: B batch, L text tokens, N video tokens, d width, H heads of identity attention, Q face tokens; of a
cache, S slots, D head size, G heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from proteus_deploy.benchmarks.ceilings import copy_rate, launch_many, launches, product_rate
from proteus_deploy.benchmarks.timing import Spread, interleave
from proteus_deploy.errors import ComputationError
from proteus_deploy.kernels.decode_attention import fused_decode_attention
from proteus_deploy.kernels.gated_residual_norm import fused_gated_residual_norm
from proteus_deploy.kernels.identity_attention import (
    FoldedIdentity,
    fused_identity_attention,
    fused_identity_attention_unfolded,
)
from proteus_deploy.kernels.joint_attention import Product, attention, fused_attention
from proteus_deploy.kernels.launch import Backend, autotune
from proteus_deploy.kernels.modulated_norm import fused_modulated_norm
from proteus_deploy.kernels.qk_norm_rotary import fused_qk_norm_rotary
from proteus_deploy.reporting import Report, no_report
from proteus_deploy.testing import TOLERANCES, Tolerance, error_order, relative_error

__all__ = ["PUBLISHED", "SMALL", "KernelCase", "KernelSize", "kernel_cases", "measure_kernels"]

_ROUNDS = 15
_WARM_UPS = 3


@dataclass(frozen=True)
class KernelSize:
    """Batch, text and video tokens, width, size of an attention head; identity heads, their size, tokens.

    images: drawn at a time from a cache with that many slots and heads; with guidance, two sequences each.
    """

    batch: int
    text: int
    video: int
    width: int
    head: int
    identity_heads: int
    identity_head: int
    queries: int
    images: int
    slots: int
    cache_heads: int


# Of CogVideoX-5B; and of LlamaGen-XL with a caption and half of an image's 32 x 32 tokens, of so many images
# that keys and values are larger than a GPU's own cache.
PUBLISHED = KernelSize(2, 226, 17_550, 3072, 64, 16, 128, 32, images=32, slots=632, cache_heads=20)
SMALL = KernelSize(2, 3, 20, 64, 32, 2, 16, 4, images=2, slots=70, cache_heads=2)


@dataclass(frozen=True, eq=False)
class KernelCase:
    """run(backend) computes the kernel ("triton") or its plain form ("reference").

    published: the eager form it replaces, where that isn't the plain form. bytes and flops: that the kernel
    has to move and compute. tolerance: of a kernel that approximates its plain form. long: one run hides
    Python's time by itself.
    """

    name: str
    run: Callable[[Backend], Any]
    bytes: int
    flops: int
    published: Callable[[], Any] | None = None
    tolerance: Tolerance | None = None
    long: bool = False


def kernel_cases(size: KernelSize, device: torch.device, dtype: torch.dtype) -> Iterator[KernelCase]:
    """The forward kernels on seeded inputs of that size; attention in each form of its first product."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, dtype=kind, device=device)
        return (scale * torch.randn(shape, generator=generator)).to(device, kind)

    b, length, n, d = size.batch, size.text, size.video, size.width
    value = torch.finfo(dtype).bits // 8
    text, video = normal(b, length, d), normal(b, n, d)
    names = ("video_shift", "video_scale", "video_gate", "text_shift", "text_scale", "text_gate")
    vectors: Any = dict(zip(names, normal(b, 1, 6 * d, scale=0.1).chunk(6, dim=-1), strict=True))
    norm: Any = {"weight": normal(d), "bias": normal(d, scale=0.1), "eps": 1e-5}
    shifts: Any = {name: vector for name, vector in vectors.items() if "gate" not in name}
    tokens = b * (length + n) * d

    inner, columns = size.identity_heads * size.identity_head, size.identity_heads * size.queries
    key, gain = normal(1, size.queries, inner), normal(1, size.queries, inner)
    weights: Any = {
        "norm_weight": normal(d),
        "norm_bias": normal(d, scale=0.1),
        "query_weight": normal(inner, d, scale=d**-0.5),
        "out_weight": normal(d, inner, scale=inner**-0.5),
    }
    gate = torch.ones(1, device=device)
    folded = FoldedIdentity(
        normal(1, columns, d, scale=d**-0.5).mT, normal(1, 1, columns, scale=0.1), normal(1, columns, d)
    )
    yield KernelCase(
        "identity attention",
        lambda backend: fused_identity_attention(
            video, folded, gate=gate, heads=size.identity_heads, backend=backend
        ),
        bytes=2 * b * n * d * value + 2 * d * columns * value,
        flops=4 * b * n * d * columns,
        published=lambda: fused_identity_attention_unfolded(
            video, key, gain, gate=gate, heads=size.identity_heads, backend="reference", **weights
        ),
    )
    yield KernelCase(
        "modulated norm",
        lambda backend: fused_modulated_norm(text, video, backend=backend, **shifts, **norm),
        bytes=2 * tokens * value,
        flops=8 * tokens,
    )
    query, keys = (normal(b, length + n, d).unflatten(-1, (-1, size.head)).transpose(1, 2) for _ in range(2))
    angles = normal(n, size.head, kind=torch.float32)
    affine = [normal(size.head) for _ in range(4)]
    yield KernelCase(
        "QK norm and rotary",
        lambda backend: fused_qk_norm_rotary(
            query,
            keys,
            query_weight=affine[0],
            query_bias=affine[1],
            key_weight=affine[2],
            key_bias=affine[3],
            cos=angles.cos(),
            sin=angles.sin(),
            eps=1e-6,
            backend=backend,
        ),
        bytes=4 * tokens * value,
        flops=20 * tokens,
    )
    update = normal(b, length + n, d)
    yield KernelCase(
        "gated residual and norm",
        lambda backend: fused_gated_residual_norm(text, video, update, backend=backend, **vectors, **norm),
        bytes=4 * tokens * value,
        flops=10 * tokens,
    )
    values = normal(b, length + n, d).unflatten(-1, (-1, size.head)).transpose(1, 2)
    products: tuple[Product, ...] = ("tokens", "int8", "fp8")
    for product in products:
        exact = product == "tokens"
        yield KernelCase(
            "joint attention" if exact else f"joint attention, {product}",
            partial(_attend, query, keys, values, product),
            # An 8-bit form reads queries and keys, writes their codes and reads those.
            bytes=4 * tokens * value + (0 if exact else 4 * tokens),
            flops=4 * (length + n) * tokens,
            tolerance=None if exact else TOLERANCES["attention", product],
            long=True,
        )
    for images in (size.images, 1):
        cache = (2 * images, size.cache_heads, size.slots, size.head)
        cached = (normal(2 * images, size.cache_heads, size.head), normal(*cache), normal(*cache))
        along = normal(2 * images, size.cache_heads, size.head, kind=torch.float32)
        yield KernelCase(
            "decode attention, one image" if images == 1 else "decode attention",
            partial(_decode, *cached, along),
            bytes=2 * (cached[0].nbytes + cached[1].nbytes) + along.nbytes + 4 * 2 * images * size.slots,
            flops=6 * cached[1].numel(),
            published=partial(_decode_eager, *cached, along),
        )


def _attend(query: Tensor, key: Tensor, values: Tensor, product: Product, backend: Backend) -> Tensor:
    """Every form is held against PyTorch's own attention, which is exact."""
    if backend == "reference":
        return attention(query, key, values)
    return fused_attention(query, key, values, product=product)


def _decode(query: Tensor, keys: Tensor, values: Tensor, along: Tensor, backend: Backend) -> Any:
    return fused_decode_attention(query, keys, values, keys.shape[2], along, backend=backend)


def _decode_eager(query: Tensor, keys: Tensor, values: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention over the slots in use, and a product of its own for the scores."""
    attended = functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
    products = (values @ along.to(values.dtype).unsqueeze(-1)).squeeze(-1).float().sum(dim=1)
    return attended.squeeze(2), products


def measure_kernels(
    size: KernelSize,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = _ROUNDS,
    compiled: bool = True,
    report: Report = no_report,
) -> list[dict[str, Any]]:
    """A row for each kernel: milliseconds of each form, error, share of the floor; a failure keeps its row.

    compiled: also the plain form under torch.compile. The kernels are autotuned first.
    """
    tokens = size.batch * (size.text + size.video)
    rows = []
    cases = list(kernel_cases(size, device, dtype))
    for number, case in enumerate(cases):
        report("kernels", number, len(cases))
        product = product_rate(dtype, device, tokens=tokens, width=size.width)
        ceilings = {"copy_bytes_per_s": copy_rate(device), "products_flop_per_s": product}
        try:
            rows.append(
                {**_measure(case, device, dtype, rounds, compiled), "ceilings": ceilings, "status": "ok"}
            )
        except Exception as error:  # noqa: BLE001 - compilers raise anything; the row says it
            rows.append({"kernel": case.name, "status": "failed", "reason": str(error)})
            continue
        floor = max(case.bytes / ceilings["copy_bytes_per_s"], case.flops / product)
        rows[-1] |= {
            "bytes": case.bytes,
            "flops": case.flops,
            "floor_ms": 1e3 * floor,
            "share_of_floor": 1e3 * floor / rows[-1]["milliseconds"]["triton"]["median"],
        }
    report("kernels", len(cases), len(cases))
    return rows


def _measure(
    case: KernelCase, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool
) -> dict[str, Any]:
    forms: dict[str, Callable[[], Any]] = {
        "triton": partial(case.run, "triton"),
        "eager": partial(case.run, "reference"),
    }
    if case.published is not None:
        forms["published"] = case.published
    if compiled:
        forms |= {f"{name} compiled": torch.compile(form) for name, form in list(forms.items())[1:]}
    with autotune():
        got = forms["triton"]()
        pairs = zip(_tensors(got), _tensors(forms["eager"]()), strict=True)
        error = max(itertools.starmap(relative_error, pairs), key=error_order)
        tolerance = case.tolerance or TOLERANCES["kernel", str(dtype).removeprefix("torch.")]
        bound = tolerance.bound
        if not error <= bound:
            raise ComputationError(f"{case.name}: relative error {error:.3g} is above {bound:g}; not timed")
        times = 1 if case.long else launches(device)
        waiting = {name: partial(launch_many, form, device, times) for name, form in forms.items()}
        for form in waiting.values():
            for _ in range(_WARM_UPS):
                form()
        seconds = interleave(waiting, rounds)
    spreads = {name: Spread.of([value / times for value in values]) for name, values in seconds.items()}
    ours = spreads["triton"].median
    return {
        "kernel": case.name,
        "relative_error": error,
        "milliseconds": {name: spread.milliseconds() for name, spread in spreads.items()},
        "speedup": {name: spread.median / ours for name, spread in spreads.items() if name != "triton"},
    }


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
