"""Kernels run on a GPU where there is one and under Triton's interpreter elsewhere, in NaN-filled memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

# Read when a kernel's module is imported, so it is set before any test can do that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    """torch.empty gives NaN, so a kernel that leaves one element unwritten fails its comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def randn(device: torch.device) -> Callable[..., Tensor]:
    """randn(*shape, dtype=...) -> the same normal numbers on every device, rounded to the dtype."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(device, dtype)

    return make


@pytest.fixture
def strided() -> Callable[[Tensor], Tensor]:
    """strided(x) -> equal values, every other element of a larger tensor along each axis."""

    def make(x: Tensor) -> Tensor:
        larger = torch.full([2 * size for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
        view = larger[tuple(slice(0, None, 2) for _ in x.shape)]
        return view.copy_(x)

    return make


@pytest.fixture
def double() -> Callable[[Any], Any]:
    """double(arguments) -> a dictionary's tensors in float64 on the CPU, where the oracle computes."""

    def make(arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.detach().double().cpu() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    return make
