from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_deploy.identity.alignment import TEMPLATE_512, align_face
from proteus_deploy.training.avatars import make_photo
from proteus_deploy.training.tiny_model.aligned_faces import (
    BACKGROUND,
    BODY,
    FACE,
    HEAD,
    DrawnPhotos,
    align_batch,
    draw_photos,
)
from proteus_deploy.training.tiny_model.fitting import step_generator

SIDE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def photos(folder: Path) -> DrawnPhotos:
    return draw_photos(folder, 2, 2, SIDE, processes=1)


def test_photos_are_ordered_by_person(photos: DrawnPhotos) -> None:
    drawn = make_photo(1001, 0, SIDE)
    assert np.array_equal(photos.images[2], drawn.image)
    assert np.array_equal(photos.landmarks[2], drawn.landmarks.astype(np.float32))
    assert np.array_equal(photos.parts[2] == FACE, drawn.face_mask)
    assert np.array_equal(photos.parts[2] >= HEAD, drawn.head_mask)
    assert np.array_equal(photos.parts[2] == BACKGROUND, ~drawn.person_mask)


def test_photos_are_drawn_once(folder: Path, photos: DrawnPhotos) -> None:
    def drawn_again(*_: object) -> None:
        raise AssertionError("drawn again")

    again = draw_photos(folder, 2, 2, SIDE, processes=1, report=drawn_again)
    assert np.array_equal(again.images, photos.images)


def test_files_that_are_not_whole_are_drawn_anew(tmp_path: Path) -> None:
    draw_photos(tmp_path, 1, 1, 32, processes=1)
    (tmp_path / "photos-32-1x1-landmarks.npy").unlink()  # written last
    (tmp_path / "photos-32-1x1-images.npy").write_bytes(b"half of it")
    assert draw_photos(tmp_path, 1, 1, 32, processes=1).images.shape == (1, 32, 32, 3)


def test_faces_lie_where_the_pipeline_puts_them(photos: DrawnPhotos) -> None:
    pixels, parts = align_batch(photos, torch.tensor([3]), 256, None)
    expected, _ = align_face(photos.images[3], photos.landmarks[3], 256)
    found = (pixels[0].permute(1, 2, 0) * 255).round().numpy()
    # Least squares here, least median of squares there: the same up to a pixel or two.
    assert np.abs(found - expected).mean() < 8
    for x, y in np.asarray(TEMPLATE_512) / 2:
        assert parts[0, int(y), int(x)] == FACE
    assert set(parts.unique().tolist()) == {BACKGROUND, BODY, HEAD, FACE}
    assert pixels.is_contiguous()


def test_parts_stay_on_their_pixels_when_moved(photos: DrawnPhotos) -> None:
    plain = DrawnPhotos(
        # The picture is the parts, so that both must move alike.
        np.repeat(photos.parts[..., None] * np.uint8(85), 3, axis=-1),
        photos.parts,
        photos.landmarks,
        2,
    )
    pixels, parts = align_batch(plain, torch.arange(4), 128, step_generator(1, 2))
    shown = (pixels[:, 0] * 3).round().long()
    inside = torch.zeros_like(parts, dtype=torch.bool)
    inside[:, 32:96, 32:96] = True  # what lies outside of the photo is grey
    assert (shown == parts)[inside].float().mean() > 0.97


def test_moves_are_bounded_and_mirror_some(photos: DrawnPhotos) -> None:
    chosen = torch.zeros(40, dtype=torch.int64)
    _, exact = align_batch(photos, chosen[:1], 64, None)
    _, moved = align_batch(photos, chosen, 64, step_generator(0, 0))
    weights = (moved == FACE).float()
    rows = torch.arange(64.0)
    middle = (weights.sum(dim=2) @ rows) / weights.sum(dim=(1, 2))
    area = weights.sum(dim=(1, 2)) / (exact == FACE).sum()
    assert middle.std() > 0.5
    assert (middle - middle.mean()).abs().max() < 64 * 0.2
    assert area.min() > 0.6
    assert area.max() < 1.6


def test_the_generator_decides_alone(photos: DrawnPhotos) -> None:
    chosen = torch.tensor([0, 3])
    first = align_batch(photos, chosen, 64, step_generator(5, 1))
    again = align_batch(photos, chosen, 64, step_generator(5, 1))
    other = align_batch(photos, chosen, 64, step_generator(5, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
