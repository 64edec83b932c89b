"""How two results are compared, and how far apart they may be: one function, one table.

Tests and `proteus-deploy verify` read the same table, so that no bound is softer in one place than in the
other. A bound is relative (‖got - want‖ / ‖want‖ over the whole tensor) or absolute (largest difference).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TOLERANCES", "Tolerance", "absolute_error", "assert_close", "measured_error", "relative_error"]


@dataclass(frozen=True)
class Tolerance:
    """Largest error that counts as equal, and why it is this one."""

    bound: float
    kind: Literal["relative", "absolute"]
    reason: str


TOLERANCES: Mapping[tuple[str, ...], Tolerance] = {
    ("parity", "transformer"): Tolerance(
        1e-5,
        "relative",
        "the published code and ours order the same float32 sums differently; 4e-7 is usual",
    ),
    ("parity", "latents"): Tolerance(
        1e-4, "relative", "rounding of one step grows over the steps of a schedule; 2e-6 is usual"
    ),
    ("parity", "frames"): Tolerance(
        2e-3, "absolute", "half of one 8-bit level in [0, 1]: a viewer's file can't differ by more than one"
    ),
    ("backbone", "transformer"): Tolerance(
        1e-5, "relative", "diffusers' CogVideoX transformer in float32, as for the published code"
    ),
    ("consisid", "transformer"): Tolerance(
        1e-5, "relative", "diffusers' ConsisID transformer in float32, as for the published code"
    ),
    ("consisid", "latents"): Tolerance(
        1e-4, "relative", "a whole run of diffusers' ConsisID pipeline, as for the published code"
    ),
    ("onnx", "transformer", "fp32"): Tolerance(
        1e-4,
        "relative",
        "another runtime fuses and reorders float32 sums; anything wired wrongly is above 1e-2",
    ),
    ("onnx", "frames", "fp32"): Tolerance(
        2e-3, "absolute", "half of one 8-bit level in [0, 1], as for the published code"
    ),
    ("bundle", "graph", "fp32"): Tolerance(
        1e-4, "relative", "another runtime fuses and reorders float32 sums; a wrong wiring is above 1e-2"
    ),
    ("bundle", "latents", "fp32"): Tolerance(
        1e-4, "relative", "rounding of one step grows over the steps of a schedule; 3e-6 is usual"
    ),
    ("bundle", "frames", "fp32"): Tolerance(
        2e-3, "absolute", "half of one 8-bit level in [0, 1], as for the published code"
    ),
    ("bundle", "graph", "fp16"): Tolerance(
        5e-3, "relative", "half precision rounds at 5e-4, several times on each path; 3e-4 to 1e-3 is usual"
    ),
    ("bundle", "latents", "fp16"): Tolerance(
        1e-2, "relative", "the error of each step is carried into the next; 1e-3 over four steps is usual"
    ),
    ("bundle", "frames", "fp16"): Tolerance(
        1e-2, "relative", "the decoder's own rounding on top of the latents'; single pixels may differ more"
    ),
    ("bundle", "graph", "bf16"): Tolerance(
        5e-2,
        "relative",
        "bfloat16 rounds at 4e-3, several times on each path; PyTorch itself is up to 4e-2 off",
    ),
    ("bundle", "latents", "bf16"): Tolerance(
        1e-1, "relative", "the error of each step is carried into the next; 3e-2 over four steps is usual"
    ),
    ("bundle", "frames", "bf16"): Tolerance(
        1e-1, "relative", "the decoder's own rounding on top of the latents'; single pixels may differ more"
    ),
    # Of a quantised bundle: by graph and its coarsest format; 16-bit bundles get their own bound on top.
    ("quantised", "denoiser", "int8"): Tolerance(
        8e-2,
        "relative",
        "twice the tiny model's at its smallest sizes: 2.1e-2, 4.1e-2 where OpenVINO cuts sums on AVX2",
    ),
    ("quantised", "denoiser", "fp8_e4m3"): Tolerance(
        1.2e-1, "relative", "twice the tiny model's at its smallest sizes: 5.2e-2, 5.8e-2 with attention"
    ),
    ("quantised", "denoiser", "int4"): Tolerance(
        2.4e-1, "relative", "twice the tiny model's at its smallest sizes: 1.2e-1"
    ),
    ("quantised", "denoiser", "nvfp4"): Tolerance(
        2.4e-1, "relative", "twice the tiny model's at its smallest sizes: 1.1e-1"
    ),
    ("quantised", "text_encoder", "int8"): Tolerance(
        6e-2,
        "relative",
        "1.3e-2 in the tiny model's; 3.8e-2 in one of random weights, whose softmax hangs on single scores",
    ),
    ("quantised", "image_tower", "int8"): Tolerance(
        2e-2,
        "relative",
        "steps of a 127th of each row's largest weight: 9e-3 in the tiny model's image tower",
    ),
    # Of the recorded request: random features, four steps, guidance of 6, which magnifies what differs
    # between the two rows. Twice the largest of the tiny model's recipes on ONNX Runtime and OpenVINO.
    ("quantised", "latents", "int8"): Tolerance(
        1.6e-1, "relative", "twice the tiny model's recorded request: 8.2e-2"
    ),
    ("quantised", "latents", "fp8_e4m3"): Tolerance(
        3.2e-1, "relative", "twice the tiny model's recorded request: 1.6e-1, with attention"
    ),
    ("quantised", "latents", "int4"): Tolerance(
        2.2e-1, "relative", "twice the tiny model's recorded request: 1.1e-1"
    ),
    ("quantised", "latents", "nvfp4"): Tolerance(
        2.8e-1, "relative", "twice the tiny model's recorded request: 1.4e-1"
    ),
    # Relative: the worst pixel of all says little of a video.
    ("quantised", "frames", "int8"): Tolerance(
        8e-2, "relative", "twice the tiny model's recorded request: 3.9e-2"
    ),
    ("quantised", "frames", "fp8_e4m3"): Tolerance(
        1.7e-1, "relative", "twice the tiny model's recorded request: 8.5e-2, with attention"
    ),
    ("quantised", "frames", "int4"): Tolerance(
        1.3e-1, "relative", "twice the tiny model's recorded request: 6.2e-2"
    ),
    ("quantised", "frames", "nvfp4"): Tolerance(
        1.6e-1, "relative", "twice the tiny model's recorded request: 7.8e-2"
    ),
    ("quantised", "same codes", "fp32"): Tolerance(
        2e-3,
        "relative",
        "the same codes summed in another order; where that moves a value over the middle between two "
        "codes, the next product differs by a step",
    ),
    ("batch", "latents"): Tolerance(
        1e-5, "relative", "matrix products of another batch size round differently, and nothing else changes"
    ),
    ("portrait", "choice"): Tolerance(
        1e-4,
        "absolute",
        "of mean cosine, by which what PyTorch gave up is less redundant than what the graph would give up: "
        "float32 sums in another order",
    ),
    ("vae", "frames"): Tolerance(
        1e-5, "absolute", "the same convolutions on the same chunks and tiles; only the blending is reordered"
    ),
    ("training", "loss"): Tolerance(
        1e-5,
        "relative",
        "sums over clips in another order: float32 rounding, and six digits in the log; a part that counts "
        "by its mask's area is 1e-1 off",
    ),
    ("training", "weights"): Tolerance(
        1e-5,
        "relative",
        "of the change, with AdamW's epsilon at 1, where it goes with the gradient: float32 sums in another "
        "order; 1e-6 is usual",
    ),
    ("kernel", "float64"): Tolerance(
        1e-12, "relative", "two exactly equal forms: what remains is float64 rounding, 1e-15 a product"
    ),
    ("kernel", "float32"): Tolerance(
        2e-6, "relative", "float32 against float64: 6e-8 a product, summed over a few hundred of them"
    ),
    ("kernel", "bfloat16"): Tolerance(
        1e-2, "relative", "bfloat16 against float64: 4e-3 a rounding, as the unfolded form has too"
    ),
    ("kernel", "float16"): Tolerance(
        2e-3, "relative", "float16 against float64: 5e-4 a rounding, as often as in bfloat16"
    ),
    ("attention", "int8"): Tolerance(
        2e-2,
        "relative",
        "of standard normal queries and keys the largest in a group is 3.3 to 3.6, a 127th of it the step: "
        "each score is 1.1e-2 off, and so are the weights; tokens' own 16 bits add as much at most",
    ),
    ("attention", "fp8"): Tolerance(
        7e-2,
        "relative",
        "e4m3 has three bits behind the first: standard normal numbers are 2.4e-2 off, a score of two of "
        "them 3.5e-2; twice that for the few weights that a row may consist of",
    ),
}


def relative_error(got: Any, want: Any) -> float:
    """‖got - want‖ / ‖want‖ in float64; NaN where a number is not finite, infinity where want is zero.

    Takes tensors and arrays. Raises ValueError when the shapes differ.
    """
    first, second = _pair(got, want)
    difference, size = (first - second).norm().item(), second.norm().item()
    if size == 0:
        return 0.0 if difference == 0 else float("inf") if difference > 0 else float("nan")
    return float(difference / size)


def absolute_error(got: Any, want: Any) -> float:
    """The largest |got - want|, NaN where a number is not finite. Raises ValueError when shapes differ."""
    first, second = _pair(got, want)
    return float((first - second).abs().max().item()) if first.numel() else 0.0


def error_order(error: float) -> float:
    """Sort key of errors: NaN is worse than anything, where `max` alone may pass over it."""
    return math.inf if math.isnan(error) else error


def measured_error(got: Any, want: Any, tolerance: Tolerance) -> float:
    """The error of the kind that `tolerance` bounds."""
    return relative_error(got, want) if tolerance.kind == "relative" else absolute_error(got, want)


def assert_close(name: str, got: Any, want: Any, tolerance: Tolerance) -> float:
    """Compare, print the error even when it passes, and return it.

    Raises AssertionError that names the result, the error, the bound and its reason. A NaN never passes.
    """
    try:
        error = measured_error(got, want, tolerance)
    except ValueError as mismatch:
        raise AssertionError(f"{name}: {mismatch}") from mismatch
    sys.stdout.write(f"{name}: {tolerance.kind} error {error:.3g}, at most {tolerance.bound:g}\n")
    if not error <= tolerance.bound:
        raise AssertionError(
            f"{name}: {tolerance.kind} error {error:.3g} is above {tolerance.bound:g} ({tolerance.reason})"
        )
    return error


def _pair(got: Any, want: Any) -> tuple[Tensor, Tensor]:
    import torch

    first, second = (torch.as_tensor(value).detach().cpu().double() for value in (got, want))
    if first.shape != second.shape:
        raise ValueError(f"the shape is {list(first.shape)}, expected {list(second.shape)}")
    return first, second
