from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from proteus_deploy.identity.encoder import normalise_tower_input
from proteus_deploy.identity.image_tower import load_image_tower
from proteus_deploy.training.tiny_model import image_tower
from proteus_deploy.training.tiny_model.aligned_faces import HEAD, DrawnPhotos, align_batch, draw_photos
from proteus_deploy.training.tiny_model.fitting import step_generator
from proteus_deploy.training.tiny_model.image_tower import TOWER_SIZES, train_image_tower


class _NoText:
    """Stands in for the trained text encoder: only shapes matter here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def states(self, texts: list[str]) -> Tensor:
        return torch.ones(len(texts), 20, 128)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> DrawnPhotos:
    return draw_photos(tmp_path_factory.mktemp("photos"), 3, 2, 64, processes=1)


@pytest.fixture(scope="module")
def trained(photos: DrawnPhotos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_tower, "draw_photos", lambda *_, **__: photos)
        patch.setattr(image_tower, "FrozenText", _NoText)
        patch.setattr(image_tower, "_PEOPLE", 3)
        patch.setattr(image_tower, "_PEOPLE_OF_BATCH", 2)
        return train_image_tower(tmp_path_factory.mktemp("tower"), steps=2)


def test_the_pipeline_loads_the_file(trained: Path) -> None:
    tower = load_image_tower(trained)
    assert tower.sizes == TOWER_SIZES
    assert tower.sizes.image_size == 84
    outputs = tower(face=torch.zeros(1, 3, 84, 84))
    assert outputs["pooled"].shape == (1, 64)
    assert [outputs[f"hidden_{depth}"].shape for depth in range(5)] == [(1, 37, 96)] * 5


def test_the_file_has_the_public_names_and_no_heads(trained: Path) -> None:
    tensors = load_file(trained)
    assert all(key.startswith("visual.") for key in tensors)
    assert {"visual.rope.freqs_cos", "visual.rope.freqs_sin", "visual.cls_token"} <= set(tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    document = json.loads((trained.parent / "image_tower.json").read_text())
    assert document == {"hidden_layers": [2, 3, 4, 5, 6]}


def test_faces_are_grey_on_white(photos: DrawnPhotos) -> None:
    faces = image_tower._batch(photos, torch.arange(4), step_generator(0, 1))
    assert faces.shape == (4, 3, 84, 84)
    # Undo the normalisation, whose numbers differ by channel.
    zero = normalise_tower_input(torch.zeros(1, 3, 84, 84), 84)
    one = normalise_tower_input(torch.ones(1, 3, 84, 84), 84)
    plain = (faces - zero) / (one - zero)
    torch.testing.assert_close(plain[:, 0], plain[:, 1], rtol=0, atol=1e-5)
    _, parts = align_batch(photos, torch.arange(4), 84, None)
    corners = plain[:, 0, -4:, :4].mean()  # shoulders and wall
    assert corners > 0.9
    assert (parts[:, 42, 42] >= HEAD).all()
    assert (plain[:, 0, 24:60, 24:60].amin(dim=(1, 2)) < 0.6).all()  # eyes and brows


def test_uncertain_edges_grow_and_shrink() -> None:
    parts = torch.zeros(16, 1, 20, 20, dtype=torch.int64)
    parts[:, :, 6:14, 6:14] = 3
    sizes = set()
    for step in range(12):
        changed = image_tower._uncertain(parts, step_generator(0, step))
        assert set(changed.unique().tolist()) == {0.0, 3.0}
        sizes |= {int(size) for size in (changed == 3).sum(dim=(1, 2, 3))}
    assert sizes == {4**2, 6**2, 8**2, 10**2, 12**2}


def test_equal_prompts_are_no_wrong_answers() -> None:
    # Rows 0 and 1 have the same prompt, so their logits are as high for each other as for themselves.
    logits = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    numbers = torch.tensor([4, 4, 7])
    same = numbers[:, None] == numbers[None]
    assert image_tower._contrast(logits, same) < 0.001
    assert image_tower._contrast(logits, torch.eye(3, dtype=torch.bool)) > 0.4


def test_contrast_counts_both_ways() -> None:
    logits = torch.tensor([[5.0, 0.0], [5.0, 0.0]])  # the second row is wrong; each column is a tie
    by_rows = (0.0067 + 5.0067) / 2
    by_columns = 0.6931
    found = image_tower._contrast(logits, torch.eye(2, dtype=torch.bool))
    assert found.item() == pytest.approx((by_rows + by_columns) / 2, abs=1e-3)


def test_every_weight_learns() -> None:
    network = image_tower._Trained()
    labels = torch.zeros(2, 13, dtype=torch.int64)
    loss, details = network.loss(
        torch.randn(4, 3, 84, 84), torch.randn(2, 20, 128), torch.tensor([0, 1]), labels
    )
    loss.backward()
    assert {"words", "people", "traits"} <= set(details)
    assert not [name for name, value in network.named_parameters() if value.grad is None]
