"""The tiny face detector: what it is taught, SCRFD's contract through insightface, and a short training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from proteus_deploy.errors import InputError
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.tiny_model import drawn_people
from proteus_deploy.training.tiny_model.detector_canvases import CANVAS, LabelledCanvas, draw_canvas
from proteus_deploy.training.tiny_model.detector_loss import (
    ANCHORS,
    anchor_places,
    assign_faces,
    detector_loss,
    encode_faces,
)
from proteus_deploy.training.tiny_model.drawn_people import DrawnPeople, draw_people
from proteus_deploy.training.tiny_model.face_detector import (
    TinyDetector,
    canvas_batch,
    train_face_detector,
    write_face_detector,
)
from proteus_deploy.training.tiny_model.fitting import FitSettings, step_generator

SAME_MATHS = Tolerance(2e-5, "absolute", "float32 rounding; folding a batch norm reorders products")
ROUNDING = Tolerance(1e-3, "absolute", "float32 rounding of pixels up to 640")
# A face of 80 x 96 pixels in the input: upper left, lower right, eyes, nose tip, mouth corners.
FACE = np.array(
    [[200, 140], [280, 236], [222, 176], [258, 178], [240, 200], [225, 214], [256, 215]], np.float32
)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> DrawnPeople:
    return draw_people(tmp_path_factory.mktemp("people"), 3, processes=1)


def scrfd(file: Path) -> Any:
    from insightface.model_zoo import get_model

    model = get_model(str(file), providers=["CPUExecutionProvider"])
    model.prepare(0, det_thresh=0.5, input_size=(640, 640))
    return model


def labelled(*faces: NDArray[np.float32]) -> LabelledCanvas:
    image = np.zeros((CANVAS, CANVAS, 3), np.uint8)
    points = np.array(faces, np.float32).reshape(-1, 7, 2) / np.float32(4)
    return LabelledCanvas(image, points, np.zeros((0, 2, 2), np.float32))


@pytest.mark.parametrize("grown", [0.5, 1.0, 2.3, 5.0])
def test_insightface_decodes_what_is_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: float
) -> None:
    """Planted outputs go through insightface's own arithmetic and its merging of neighbours."""
    face = ((FACE - [240, 188]) * grown + [303, 290]).astype(np.float32)
    corners, sizes = anchor_places()
    label, near, _ = assign_faces(labelled(face), corners, sizes)
    assert int((label == 1).sum()) > 1
    # Whoever may report the face knows where it is.
    assert bool(near[label == 1].all())
    box, marks = encode_faces(torch.from_numpy(face).expand(len(corners), 7, 2), corners, sizes)
    counts = [2 * (640 // stride) ** 2 for stride in ANCHORS]
    outputs = [part[:, None].numpy() for part in (label == 1).float().split(counts)]
    for values in (box, marks):
        in_pixels = (values * sizes[:, None]).split(counts)
        outputs += [(part / stride).numpy() for part, stride in zip(in_pixels, ANCHORS, strict=True)]

    class Planted:
        def run(self, *_: object) -> list[NDArray[np.float32]]:
            return outputs

    model = scrfd(write_face_detector(TinyDetector(), tmp_path / "scrfd.onnx"))
    monkeypatch.setattr(model, "_session_for_input_size", lambda _size: Planted())
    boxes, landmarks = model.detect(np.zeros((640, 640, 3), np.uint8))
    assert len(boxes) == 1
    assert_close("box", torch.from_numpy(boxes[0, :4]), torch.from_numpy(face[:2].ravel()), ROUNDING)
    assert_close("landmarks", torch.from_numpy(landmarks[0]), torch.from_numpy(face[2:]), ROUNDING)


def test_the_onnx_file_computes_what_the_network_computes(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(1)
    detector = TinyDetector()
    detector.train()
    with torch.no_grad():
        for _ in range(3):  # batch norms whose statistics are not 0 and 1
            detector(torch.randn(2, 3, CANVAS, CANVAS) + 0.3)
        for head in detector.heads:
            cast("nn.Conv2d", cast("nn.Sequential", head)[-1]).weight.mul_(30)
    file = write_face_detector(detector.eval(), tmp_path / "scrfd.onnx")
    image = torch.rand(1, 3, 640, 640) * 2 - 1
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        scores, boxes, marks = detector(torch.nn.functional.avg_pool2d(image, 4))
    counts = [2 * (640 // stride) ** 2 for stride in ANCHORS]
    _, sizes = anchor_places()
    assert [list(output.shape) for output in outputs[:3]] == [[count, 1] for count in counts]
    assert_close(
        "scores", torch.from_numpy(np.concatenate(outputs[:3]))[:, 0], scores[0].sigmoid(), SAME_MATHS
    )
    for name, values, found in (("boxes", boxes, outputs[3:6]), ("landmarks", marks, outputs[6:])):
        strides = zip((values[0] * sizes[:, None]).split(counts), ANCHORS, strict=True)
        wanted = torch.cat([part / stride for part, stride in strides])
        assert_close(name, torch.from_numpy(np.concatenate(found)), wanted, SAME_MATHS)
    again = write_face_detector(detector, tmp_path / "again.onnx")
    assert file.read_bytes() == again.read_bytes()
    assert file.stat().st_size < 600_000


def test_every_size_of_face_has_its_anchors() -> None:
    corners, sizes = anchor_places()
    for width in (30, 40, 57, 80, 110, 150, 210, 300, 420, 460):
        face = np.array([[90.0, 70.0], [90 + width, 70 + 1.17 * width]] + [[100.0, 100.0]] * 5, np.float32)
        label, _, _ = assign_faces(labelled(face), corners, sizes)
        assert int((label == 1).sum()) > 0, width
        # Cells far from the face say no.
        assert int((label == 0).sum()) > 10_000


def test_a_cut_off_face_is_neither_asked_for_nor_punished() -> None:
    corners, sizes = anchor_places()
    empty = labelled()
    canvas = LabelledCanvas(empty.image, empty.faces, FACE[None, :2] / np.float32(4))
    label, near, _ = assign_faces(canvas, corners, sizes)
    inside = ((corners >= torch.from_numpy(FACE[0])) & (corners <= torch.from_numpy(FACE[1]))).all(dim=1)
    assert bool((label[inside] == -1).all())
    assert bool((label[~inside] == 0).all())
    assert not bool(near.any())


def test_the_loss_of_the_right_answer_is_least() -> None:
    corners, sizes = anchor_places()
    canvases = [labelled(FACE), labelled()]
    label, _, _ = assign_faces(canvases[0], corners, sizes)
    box, marks = encode_faces(torch.from_numpy(FACE).expand(len(corners), 7, 2), corners, sizes)
    scores = torch.stack([label.clamp(min=0) * 24.0 - 12, torch.full_like(sizes, -12)])
    right = (scores, box.expand(2, -1, 4), marks.expand(2, -1, 10))
    best = float(detector_loss(right, canvases)[0])
    assert best < 0.02
    wrong = [
        (scores.flip(0), *right[1:]),
        (scores, right[1] + 0.1, right[2]),
        (*right[:2], right[2].roll(2, dims=2)),
    ]
    for number, other in enumerate(wrong):
        assert float(detector_loss(other, canvases)[0]) > 10 * best + 0.05, number


def test_points_lie_on_what_is_pasted() -> None:
    """Pictures in which the face is white and everything else black."""
    side, points = 96, FACE / 4 - [20, 10]
    picture = np.zeros((side, side, 3), np.uint8)
    (x0, y0), (x1, y1) = points[:2].astype(int)
    picture[y0:y1, x0:x1] = 255
    many = np.broadcast_to(points.astype(np.float32), (1, 2, 7, 2))
    pictures = np.broadcast_to(picture, (1, 2, side, side, 3))
    people = DrawnPeople(pictures, many, pictures, many)
    draw = np.random.default_rng(0)
    seen = 0
    for _ in range(60):
        canvas = draw_canvas(people, draw)
        for face in canvas.faces:
            seen += 1
            (x0, y0), (x1, y1) = face[:2].round().astype(int)
            inside = canvas.image[max(0, y0) + 1 : y1 - 1, max(0, x0) + 1 : x1 - 1]
            assert inside.size == 0 or inside.mean() > 150
            marks = face[2:]
            assert marks[0, 0] < marks[1, 0]
            assert marks[3, 0] < marks[4, 0]
            assert (face[:2] >= -0.16 * CANVAS).all()
    assert seen > 40


def test_people_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw_people(tmp_path, 2, processes=1)
    assert first.photos.shape == (2, 2, 192, 192, 3)
    assert first.frames.shape == (2, 6, 96, 96, 3)
    for person in range(2):
        for index in range(first.pictures):
            image, points = first.picture(person, index)
            assert ((points[2:] > points[0]) & (points[2:] < points[1])).all()
            assert (points[1] <= image.shape[0]).all()

    def never(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawn_people, "_draw", never)
    again = draw_people(tmp_path, 2, processes=1)
    assert (np.asarray(first.frames) == np.asarray(again.frames)).all()
    with pytest.raises(InputError, match="0 people"):
        draw_people(tmp_path, 0)


def test_a_step_draws_the_same_canvases_whenever_it_is_taken(people: DrawnPeople) -> None:
    images, canvases = canvas_batch(people, 3, step_generator(5, 17))
    again, _ = canvas_batch(people, 3, step_generator(5, 17))
    other, _ = canvas_batch(people, 3, step_generator(5, 18))
    assert images.shape == (3, 3, CANVAS, CANVAS)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    # SCRFD's scale, and RGB.
    assert_close(
        "red",
        images[0, 0] * 128 + 127.5,
        torch.from_numpy(canvases[0].image[..., 0]).float(),
        Tolerance(1e-4, "absolute", "float32 rounding of 0..255"),
    )


def test_training_lowers_the_loss_and_ends_in_a_detector(tmp_path: Path) -> None:
    settings = FitSettings(steps=40, learning_rate=8e-3, warmup=2, ema=0.5, log_every=1, seed=3)
    file = train_face_detector(tmp_path, people=2, settings=settings, batch=4, processes=1)
    log = (tmp_path / "face_detector.log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert len(losses) == 40
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    boxes, landmarks = scrfd(file).detect(np.zeros((96, 96, 3), np.uint8))
    assert boxes.shape[1] == 5
    assert landmarks.shape[1:] == (5, 2)
    # Trained already: the same call gives the same bytes without a step.
    before = file.read_bytes()
    file.unlink()
    assert train_face_detector(tmp_path, people=2, settings=settings, batch=4, processes=1) == file
    assert file.read_bytes() == before
