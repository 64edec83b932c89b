"""One tiny checkpoint for all tests of this folder, its encoder, and drawn portraits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.identity.encoder import IdentityEncoder
from proteus_deploy.identity.faces import FaceDetector
from proteus_deploy.tiny.face_pack import write_face_encoder
from proteus_deploy.tiny.portrait import draw_portrait

Image = NDArray[np.uint8]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tiny `face_encoder` and nothing else; not to be written to."""
    folder = tmp_path_factory.mktemp("identity-checkpoint")
    write_face_encoder(folder / "face_encoder", seed=0)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> IdentityEncoder:
    return IdentityEncoder.from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def detector(encoder: IdentityEncoder) -> FaceDetector:
    return encoder.detector


@pytest.fixture(scope="session")
def portrait() -> Callable[[int], Image]:
    """portrait(seed) -> RGB uint8 [320, 320, 3]; not to be written to."""

    @cache
    def drawn(seed: int) -> Image:
        image = np.array(draw_portrait(seed, 320))
        image.setflags(write=False)
        return image

    return drawn


@pytest.fixture(scope="session")
def two_people(portrait: Callable[[int], Image]) -> Image:
    """Person 1 small on the left, person 2 large on the right: RGB uint8 [320, 520, 3]."""
    photo = np.full((320, 520, 3), (200, 214, 224), dtype=np.uint8)
    photo[100:300, :200] = np.array(draw_portrait(1, 200))
    photo[:, 200:] = portrait(2)
    return photo


@pytest.fixture(scope="session")
def report() -> Callable[[str], None]:
    """Write a line that pytest shows with -s or when the test fails: errors are seen even when they pass."""

    def write(line: str) -> None:
        sys.stdout.write(line + "\n")

    return write


@pytest.fixture(scope="session")
def golden(repository: Path) -> Path:
    """Folder of weights, inputs and outputs of the public networks, made small (see its README)."""
    return repository / "tests" / "data" / "identity"
