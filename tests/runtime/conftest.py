"""Small ONNX bundles for the backends, written by hand."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from proteus_deploy.bundle import Bundle


@pytest.fixture
def new_bundle(tmp_path: Path, repository: Path) -> Callable[..., Bundle]:
    """new_bundle(name, dtype) -> a bundle of three graphs, y = x·W + timestep and twice b = a * gate."""
    pytest.importorskip("onnx")
    make: Callable[..., Bundle] = runpy.run_path(str(repository / "tests/export/conftest.py"))["make_bundle"]
    return lambda name, *arguments: make(tmp_path / name, *arguments)
