"""Shared fixtures: the same random numbers in every test, GPU tests skipped with a reason."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Derandomized and without a database: a test fails for everyone or for nobody. No deadline: timings on a
# busy machine say nothing about the code.
settings.register_profile("proteus", derandomize=True, database=None, deadline=None)
settings.load_profile("proteus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none on this machine"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed every generator in use; torch and numpy only where a test has loaded them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree that is being tested."""
    return Path(__file__).resolve().parent.parent
