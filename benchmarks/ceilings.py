"""What the machine can do at best: its rate of matrix products and of copies, and the work of a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from proteus_deploy.checkpoint import Checkpoint

__all__ = ["copy_rate", "denoiser_flops", "launch_many", "launches", "product_rate"]

_RUNS = 5
_COPIED_BYTES = 256 << 20  # far more than a cache holds


def product_rate(dtype: torch.dtype, device: torch.device, *, tokens: int, width: int) -> float:
    """FLOP/s of [tokens, width] @ [width, 4 * width], the largest product of a block; median of 5 runs."""
    left = torch.randn(tokens, width, dtype=dtype, device=device)
    right = torch.randn(width, 4 * width, dtype=dtype, device=device)
    return 2 * tokens * width * 4 * width / _seconds(lambda: left @ right, device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written together, of a copy of 256 MiB; median of 5 runs."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _seconds(lambda: target.copy_(source), device)


def launches(device: torch.device) -> int:
    """How often `launch_many` starts the work: on a GPU so often that Python's time is hidden behind it."""
    return 20 if device.type == "cuda" else 1


def launch_many(work: Callable[[], object], device: torch.device, times: int | None = None) -> None:
    """Start the work `times` times (None: `launches` times), then wait for the device once."""
    for _ in range(launches(device) if times is None else times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        started = time.perf_counter()
        launch_many(work, device)
        return (time.perf_counter() - started) / launches(device)

    once()
    return statistics.median(once() for _ in range(_RUNS))


def denoiser_flops(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> int:
    """Floating point operations of one call of the denoiser, an addition and a multiplication counted as two.

    Of all products, attention and convolutions, in the folded form; inputs: as the stage takes them, of which
    only shapes and dtypes matter. Nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from proteus_deploy.network_factory import NetworkFactory

    module = NetworkFactory(checkpoint, folded=True)("denoiser").module.to(torch.float32)
    shapes = {name: torch.empty_like(value, device="meta") for name, value in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        module(**shapes)
    return int(counter.get_total_flops())
