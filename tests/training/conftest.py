"""The script of small training runs, as a module for tests and as a command for subprocesses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """tests/training/fake_run.py as a module: tests can't import each other's files."""
    file = Path(__file__).with_name("fake_run.py")
    specification = importlib.util.spec_from_file_location("fake_run", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fake_run"] = module
    specification.loader.exec_module(module)
    return module
