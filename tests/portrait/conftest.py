"""A portrait checkpoint in miniature and its painter, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait


@pytest.fixture(scope="session")
def portrait_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_portrait(tmp_path_factory.mktemp("portrait") / "checkpoint")


@pytest.fixture(scope="session")
def painter(portrait_folder: Path) -> TorchPainter:
    return TorchPainter(PortraitCheckpoint.open(portrait_folder))
