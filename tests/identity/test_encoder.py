from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from proteus_deploy.errors import CheckpointError, InputError, PhotoError
from proteus_deploy.identity.alignment import TEMPLATE_512, align_face, transform_points
from proteus_deploy.identity.encoder import PARSER_NAME, TOWER_NAME, IdentityEncoder
from proteus_deploy.identity.faces import Face
from proteus_deploy.identity.features import IdentityFeatures

Image = NDArray[np.uint8]


def equal(one: IdentityFeatures, other: IdentityFeatures) -> bool:
    assert one.keypoints is not None
    assert other.keypoints is not None
    pairs = [(one.id_cond, other.id_cond), (one.keypoints, other.keypoints)]
    pairs += list(zip(one.id_vit_hidden, other.id_vit_hidden, strict=True))
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_portrait_from_end_to_end(
    encoder: IdentityEncoder, portrait: Callable[[int], Image], tmp_path: Path
) -> None:
    features, condition = encoder.encode(portrait(0))
    assert features.id_cond.shape == (1, 1, 64)
    assert [tuple(state.shape) for state in features.id_vit_hidden] == [(1, 17, 32)] * 5
    assert {features.id_cond.dtype, *(state.dtype for state in features.id_vit_hidden)} == {torch.float32}
    assert features.id_cond[0, 0, :32].norm() > 5, "the recogniser's part is not normalised"
    assert features.id_cond[0, 0, 32:].norm().item() == pytest.approx(1, abs=1e-6)
    assert condition.shape == (512, 512, 3)
    assert condition.dtype == np.uint8
    assert not features.id_cond.is_inference(), "features must be usable in training code"

    file = tmp_path / "portrait.png"
    Pillow.fromarray(portrait(0)).save(file)
    again, same_condition = encoder.encode(file)
    assert equal(features, again)
    assert np.array_equal(condition, same_condition)


def test_keypoints_are_those_of_the_crop(encoder: IdentityEncoder, portrait: Callable[[int], Image]) -> None:
    image = portrait(1)
    (face,) = encoder.detector.detect(image)
    _, warp = align_face(image, face.landmarks)
    features, _ = encoder.encode(image)
    assert features.keypoints is not None
    points = features.keypoints.numpy()
    assert np.array_equal(points, transform_points(warp, face.landmarks))
    assert np.abs(points - np.array(TEMPLATE_512)).max() < 5, "drawn faces have the template's proportions"
    assert np.abs(points - face.landmarks).max() > 50, "not the points of the photo"


def test_features_do_not_depend_on_what_surrounds_the_face(
    encoder: IdentityEncoder,
    two_people: Image,
    portrait: Callable[[int], Image],
    report: Callable[[str], None],
) -> None:
    """One face, chosen once, gives the embedding, the crop and the tower's input."""
    right, right_crop = encoder.encode(two_people)
    left, left_crop = encoder.encode(two_people, face_index=0)
    named, _ = encoder.encode(two_people, face_index=1)
    assert equal(right, named), "the largest face is the second from the left"
    alone, alone_crop = encoder.encode(portrait(2))

    def distance(one: Image, other: Image) -> float:
        return float(np.abs(one[150:400, 150:360].astype(float) - other[150:400, 150:360]).mean())

    def cosine(one: IdentityFeatures, other: IdentityFeatures) -> float:
        left, right = one.id_cond[0, 0, :32], other.id_cond[0, 0, :32]
        return float(torch.nn.functional.cosine_similarity(left, right, dim=0))

    same, other = distance(right_crop, alone_crop), distance(left_crop, alone_crop)
    report(f"mean difference of the crops: same person {same:.1f}, another {other:.1f}")
    report(f"embedding: same person {cosine(right, alone):.3f}, other {cosine(left, alone):.3f}")
    assert same < 10 < other
    assert cosine(right, alone) > 0.97 > cosine(left, alone)


class Recorder:
    """Stands for both networks: notes its input, hides what `hidden` says, and gives a fixed vector."""

    def __init__(self, label: int = 1) -> None:
        self.label, self.seen = label, torch.empty(0)

    def __call__(self, *, face: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen = face.clone()
        logits = torch.zeros(1, 19, *face.shape[-2:])
        logits[:, self.label] = 1.0
        logits[:, 0, :, :256] = 2.0
        states = {f"hidden_{depth}": torch.full((1, 3, 4), float(depth)) for depth in range(5)}
        return {"logits": logits, "pooled": torch.tensor([[3.0, 0.0, 4.0]]), **states}


def test_any_backend_serves_the_networks(encoder: IdentityEncoder, portrait: Callable[[int], Image]) -> None:
    parser, tower = Recorder(), Recorder()
    composed = IdentityEncoder(encoder.detector, parser, tower, tower_size=48)
    features, condition = composed.encode(portrait(0))
    (face,) = encoder.detector.detect(portrait(0))
    crop, _ = align_face(portrait(0), face.landmarks)

    pixels = torch.from_numpy(crop).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(parser.seen[0], (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-6)
    assert tower.seen.shape == (1, 3, 48, 48)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    shown = tower.seen[0] * std[:, None, None] + mean[:, None, None]
    assert torch.allclose(shown[:, :, :20], torch.ones(3, 48, 20), atol=1e-5), "hidden: white"
    assert torch.allclose(shown[0], shown[2], atol=1e-5), "the tower sees grey"

    assert (condition[:, :256] == 255).all()
    lost = crop[:, 256:].astype(int) - condition[:, 256:]
    assert set(np.unique(lost)) <= {0, 1}, "truncated, as published"
    assert np.array_equal(condition[:, 256:], (crop[:, 256:].astype(np.float32) / 255 * 255).astype(np.uint8))
    assert torch.allclose(features.id_cond[0, 0, 32:], torch.tensor([0.6, 0.0, 0.8]))
    assert [float(state[0, 0, 0]) for state in features.id_vit_hidden] == [0, 1, 2, 3, 4]


def test_a_parser_of_another_shape_is_refused(
    encoder: IdentityEncoder, portrait: Callable[[int], Image]
) -> None:
    composed = IdentityEncoder(encoder.detector, lambda *, face: {"logits": face}, Recorder())
    with pytest.raises(CheckpointError, match=r"\[1, 3, 512, 512\]; expected \[1, 19, 512, 512\]"):
        composed.encode(portrait(0))
    with pytest.raises(InputError, match="tower_size is 0"):
        IdentityEncoder(encoder.detector, Recorder(), Recorder(), tower_size=0)


def test_a_large_photo_is_shrunk_first(encoder: IdentityEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def detect(image: Image) -> list[Face]:
        seen.append(image.shape)
        return []

    monkeypatch.setattr(encoder.detector, "detect", detect)
    with pytest.raises(PhotoError, match="no face"):
        encoder.encode(np.zeros((2048, 1000, 3), np.uint8))
    assert seen == [(1024, 500, 3)], "and nothing else is tried"


def test_no_face_and_no_such_face(
    encoder: IdentityEncoder, portrait: Callable[[int], Image], two_people: Image
) -> None:
    with pytest.raises(PhotoError, match="no face was found"):
        encoder.encode(np.full((64, 64, 3), 200, np.uint8))
    with pytest.raises(PhotoError, match="there is no face 1: the photo has 1"):
        encoder.encode(portrait(0), face_index=1)
    with pytest.raises(PhotoError, match="there is no face 2: the photo has 2"):
        encoder.encode(two_people, face_index=2)


@pytest.mark.parametrize(("name", "suffix"), [(TOWER_NAME, ".pt"), (PARSER_NAME, ".pth")])
def test_a_pickle_is_refused_with_the_command(
    tiny_checkpoint: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "face_encoder" / name
    pickle = file.with_suffix(suffix)
    file.rename(pickle)
    with pytest.raises(CheckpointError) as caught:
        IdentityEncoder.from_checkpoint(tmp_path)
    assert f"proteus-deploy convert {pickle}" in str(caught.value)
    pickle.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} does not exist"):
        IdentityEncoder.from_checkpoint(tmp_path)


def test_a_checkpoint_without_face_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="face_encoder does not exist"):
        IdentityEncoder.from_checkpoint(tmp_path)
