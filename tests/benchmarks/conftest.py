"""Fixtures of benchmark tests."""

from __future__ import annotations

import pytest

from proteus_deploy.benchmarks import ceilings


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of copies is taken with 1 MiB: its figure doesn't matter."""
    monkeypatch.setattr(ceilings, "_COPIED_BYTES", 1 << 20)
