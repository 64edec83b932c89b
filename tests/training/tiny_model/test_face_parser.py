from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from proteus_deploy.identity.face_parser import HIDDEN_LABELS, load_face_parser
from proteus_deploy.training.tiny_model import face_parser
from proteus_deploy.training.tiny_model.aligned_faces import BACKGROUND, BODY, FACE, HEAD, draw_photos
from proteus_deploy.training.tiny_model.face_parser import LABEL_OF_PART, PARSER_SIZES, train_face_parser
from proteus_deploy.training.tiny_model.fitting import step_generator


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parser")
    with pytest.MonkeyPatch.context() as patch:
        photos = draw_photos(folder / "small", 2, 1, 64, processes=1)
        patch.setattr(face_parser, "draw_photos", lambda *_, **__: photos)
        patch.setattr(face_parser, "_BATCH", 2)
        patch.setattr(face_parser, "_SETTLING_BATCHES", 1)
        return train_face_parser(folder, steps=1)


def test_the_pipeline_loads_the_file(trained: Path) -> None:
    parser = load_face_parser(trained)
    assert trained.parts[-2:] == ("face_encoder", "parsing_bisenet.safetensors")
    with torch.no_grad():
        logits = parser(face=torch.zeros(1, 3, 64, 64))["logits"]
    assert logits.shape == (1, 19, 64, 64)
    assert logits.isfinite().all()


def test_statistics_are_those_of_the_averaged_weights(trained: Path) -> None:
    tensors = load_file(trained)
    counted = [value for key, value in tensors.items() if key.endswith("num_batches_tracked")]
    # Measured anew: one batch of one settling, and not the steps of the training.
    assert {int(value) for value in counted} == {1}
    assert not torch.equal(
        tensors["cp.resnet.bn1.running_mean"], torch.zeros(PARSER_SIZES.stages[0], dtype=torch.float16)
    )


def test_labels_keep_the_head_and_hide_the_rest() -> None:
    hidden = {part for part in (BACKGROUND, BODY, HEAD, FACE) if LABEL_OF_PART[part] in HIDDEN_LABELS}
    assert hidden == {BACKGROUND, BODY}
    assert LABEL_OF_PART[FACE] == 1
    assert LABEL_OF_PART[HEAD] == 17


def test_chosen_pixels_have_the_logits_of_the_enlarged_map() -> None:
    coarse = torch.randn(2, 5, 8, 8)
    whole = functional.interpolate(coarse, size=(64, 64), mode="bilinear", align_corners=True)
    places = torch.arange(64 * 64).expand(2, -1)
    torch.testing.assert_close(
        face_parser._enlarged_at(coarse, places, 64), whole.flatten(2), rtol=1e-4, atol=1e-4
    )


def test_places_are_oftener_at_edges() -> None:
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[:, :, 32:] = 16
    places = face_parser._drawn_places(labels, step_generator(0, 0))
    assert places.min() >= 0
    assert places.max() < 64 * 64
    columns = (places % 64).flatten()
    near = ((columns >= 28) & (columns < 36)).float().mean()
    assert near > 0.3  # they are an eighth of the picture
    # And everywhere in their cells, not at one corner of each.
    assert columns.unique().numel() == 64


def test_the_loss_compares_label_with_pixel() -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, :, 8:] = 17
    logits = torch.full((1, 19, 2, 2), -20.0)
    logits[:, 0, :, 0] = 20.0
    logits[:, 17, :, 1] = 20.0
    edges = torch.tensor([[0, 15, 16 * 15, 16 * 15 + 15]])  # the corners, where nothing is blended
    loss, details = face_parser._point_loss(logits, labels, edges)
    assert loss < 1e-6
    assert details["right"] == 1.0
    wrong, _ = face_parser._point_loss(logits.flip(3), labels, edges)
    assert wrong > 10


@pytest.mark.parametrize("step", [0, 1])
def test_another_camera_stays_in_range_and_size(step: int) -> None:
    pixels = torch.rand(1, 3, 512, 512, generator=step_generator(0, 0))
    changed = face_parser._another_camera(pixels, step_generator(0, step))
    assert changed.shape == pixels.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert not torch.equal(changed, pixels)


def test_recolouring_keeps_shade_and_the_rest() -> None:
    pixels = torch.full((6, 3, 8, 8), 0.5)
    pixels[:, :, :, :4] *= 0.8  # a shadow
    where = torch.zeros(6, 8, 8, dtype=torch.bool)
    where[:, 4:] = True
    before = pixels.clone()
    face_parser._recolour(pixels, where, 1.0, step_generator(0, 0))
    assert torch.equal(pixels[:, :, :4], before[:, :, :4])
    assert (pixels[:, :, 4:] != before[:, :, 4:]).any(dim=1).all()
    shaded, lit = pixels[:, :, 4:, :4], pixels[:, :, 4:, 4:]
    unclipped = lit < 1
    torch.testing.assert_close(shaded[unclipped], 0.8 * lit[unclipped], rtol=1e-4, atol=1e-4)
    hues = {tuple((image[:, 7, 0] / image[:, 7, 0].sum()).round(decimals=2).tolist()) for image in pixels}
    assert len(hues) == 6


def test_recolouring_leaves_the_other_share_alone() -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=step_generator(0, 0))
    before = pixels.clone()
    face_parser._recolour(pixels, torch.ones(4, 8, 8, dtype=torch.bool), 0.0, step_generator(0, 1))
    assert torch.equal(pixels, before)
    face_parser._recolour(pixels, torch.zeros(4, 8, 8, dtype=torch.bool), 1.0, step_generator(0, 1))
    assert torch.equal(pixels, before)
