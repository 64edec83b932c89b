from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.errors import BackendError, CheckpointError, InputError, PhotoError
from proteus_deploy.identity.faces import PACK_FOLDER, Face, FaceDetector, choose_face
from proteus_deploy.tiny.portrait import draw_portrait, portrait_box, portrait_landmarks

Image = NDArray[np.uint8]


def make_face(x: float, side: float) -> Face:
    return Face((x, 0.0, x + side, side), 0.9, np.zeros((5, 2), np.float32))


def test_a_drawn_face_is_found_where_it_is(
    detector: FaceDetector, portrait: Callable[[int], Image], report: Callable[[str], None]
) -> None:
    for seed in range(6):
        (face,) = detector.detect(portrait(seed))
        box = portrait_box(seed, 320)
        width = box[2] - box[0]
        assert np.abs(np.subtract(face.box, box)).max() < 0.15 * width
        error = np.abs(face.landmarks - portrait_landmarks(seed, 320)).max() / width
        report(f"portrait {seed}: landmarks off by {error:.3f} head widths, score {face.score:.2f}")
        assert error < 0.12
        assert face.landmarks.dtype == np.float32


def test_threads_rest_between_runs(detector: FaceDetector) -> None:
    """Those of the detector would take the cores from the networks that follow."""
    for model in (detector._detector, detector._recogniser):
        options = model.session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_no_face_gives_an_empty_list_and_a_clear_error(detector: FaceDetector) -> None:
    for grey in (0, 128, 255):
        faces = detector.detect(np.full((300, 400, 3), grey, np.uint8))
        assert faces == []
    with pytest.raises(PhotoError, match=r"no face was found.*use one with a face seen from the front"):
        detector.choose([])


def test_two_people_are_listed_from_left_to_right(detector: FaceDetector, two_people: Image) -> None:
    faces = detector.detect(two_people)
    assert len(faces) == 2
    assert faces[0].box[2] < 200 < faces[1].box[0]
    assert detector.choose(faces) is faces[1], "the larger one"
    assert detector.choose(faces, 0) is faces[0]
    assert detector.choose(faces, 1) is faces[1]


@pytest.mark.parametrize("index", [2, -1])
def test_an_index_out_of_range_lists_the_faces(index: int) -> None:
    with pytest.raises(PhotoError) as caught:
        choose_face([make_face(100, 60), make_face(0, 50)], index)
    message = str(caught.value)
    assert f"no face {index}" in message
    assert message.index("0: x 0..50") < message.index("1: x 100..160")
    assert "50 x 50 px" in message


def test_a_face_too_small_is_refused_with_its_size() -> None:
    assert choose_face([make_face(0, 32)]).width == 32
    with pytest.raises(PhotoError, match=r"31 x 31 px.*smaller than 32 px"):
        choose_face([make_face(5, 31)])


def test_a_small_face_in_a_photo_is_refused(detector: FaceDetector) -> None:
    photo = np.full((640, 640, 3), (200, 214, 224), np.uint8)
    photo[300:395, 300:395] = np.array(draw_portrait(2, 95))
    faces = detector.detect(photo)
    assert len(faces) == 1
    with pytest.raises(PhotoError, match="smaller than 32 px"):
        detector.choose(faces)


def test_the_embedding_is_not_normalised_and_follows_the_face(
    detector: FaceDetector, two_people: Image, portrait: Callable[[int], Image], report: Callable[[str], None]
) -> None:
    left, right = detector.detect(two_people)
    first, second = detector.embed(two_people, left), detector.embed(two_people, right)
    assert first.shape == (32,)
    assert first.dtype == np.float32
    assert np.linalg.norm(first) > 5
    # The same person elsewhere in another photo gives nearly the same vector, another person does not.
    alone = detector.embed(portrait(2), detector.detect(portrait(2))[0])

    def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    report(f"same person {cosine(alone, second):.3f}, another {cosine(alone, first):.3f}")
    assert cosine(alone, second) > 0.97
    assert cosine(alone, first) < 0.95


def test_the_embedding_is_that_of_insightface(
    detector: FaceDetector, portrait: Callable[[int], Image]
) -> None:
    from insightface.app.common import Face as TheirFace

    (face,) = detector.detect(portrait(3))
    with pytest.warns(FutureWarning):
        expected = detector._recogniser.get(
            np.ascontiguousarray(portrait(3)[:, :, ::-1]), TheirFace(kps=face.landmarks)
        )
    assert np.abs(detector.embed(portrait(3), face) - expected).max() < 0.05


def test_images_of_another_kind_are_refused(detector: FaceDetector) -> None:
    for image in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3), np.float32)):
        with pytest.raises(InputError, match="expected RGB uint8"):
            detector.detect(image)  # type: ignore[arg-type]


def test_a_missing_pack_is_an_error_and_not_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(CheckpointError, match=r"antelopev2 holds no \*.onnx files"):
        FaceDetector(tmp_path)
    (tmp_path / PACK_FOLDER).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"antelopev2 holds no \*.onnx files"):
        FaceDetector(tmp_path)
    assert list((tmp_path / PACK_FOLDER).iterdir()) == []


def copy_pack(source: Path, target: Path, *names: str) -> None:
    (target / PACK_FOLDER).mkdir(parents=True)
    for name in names:
        shutil.copy(source / "face_encoder" / PACK_FOLDER / name, target / PACK_FOLDER / name)


@pytest.mark.parametrize(
    ("name", "message"), [("scrfd_tiny.onnx", "has no recogniser"), ("glintr_tiny.onnx", "can't be loaded")]
)
def test_half_a_pack_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str, message: str) -> None:
    copy_pack(tiny_checkpoint, tmp_path, name)
    with pytest.raises(CheckpointError, match=message):
        FaceDetector(tmp_path)


def test_a_damaged_pack_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy_pack(tiny_checkpoint, tmp_path, "glintr_tiny.onnx")
    (tmp_path / PACK_FOLDER / "scrfd.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="can't be loaded as a face pack"):
        FaceDetector(tmp_path)


def test_an_absent_provider_is_an_error(tiny_checkpoint: Path) -> None:
    for providers in (["NoSuchExecutionProvider", "CPUExecutionProvider"], []):
        with pytest.raises(BackendError, match=r"available here: .*CPUExecutionProvider"):
            FaceDetector(tiny_checkpoint / "face_encoder", providers=providers)


def test_without_insightface_the_way_out_is_said(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(BackendError, match=r'insightface.*pip install "proteus-deploy\[face\]"'):
        FaceDetector(tiny_checkpoint / "face_encoder")
