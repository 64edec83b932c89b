"""FaceSim and each oddity of its published protocol."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_deploy.errors import BackendError, CheckpointError, InputError, PhotoError
from proteus_deploy.evaluate.face_similarity import (
    FacePack,
    cosine_matrix,
    face_embeddings,
    face_similarity,
    photo_embeddings,
)
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.tiny.portrait import draw_portrait, portrait_box

Image = NDArray[np.uint8]
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
FLOAT32 = Tolerance(1e-6, "absolute", "cosines of float32 vectors, computed in float64")


def test_the_largest_face_is_taken_and_not_the_surest(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    """The larger face (blue dot) lies on the right half, which is green."""
    image = dotted((90, 90, 90), (20, 40, RED), (80, 40, BLUE), size=(80, 110))
    image[:, 50:][(image[:, 50:] == 90).all(axis=2)] = GREEN
    face = stand_in_pack().read(image)
    assert face is not None
    assert not face.padded
    assert face.crop.shape == (224, 224, 3)
    assert face.crop[60, 60].tolist() == list(GREEN)
    assert face.embedding[1] > 200
    assert face.embedding[2] < 50


def test_a_face_near_the_edge_is_found_with_a_grey_border(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    image = dotted((10, 200, 60), (12, 15, RED))  # 100 high, 80 wide
    pack = stand_in_pack(margin=25)
    face = pack.read(image)
    assert face is not None
    assert face.padded
    first, second = pack._detector.seen
    assert first.shape == (100, 80, 3)
    assert second.shape == (150, 120, 3), "a quarter of the height and of the width on each side"
    assert (second[:25] == 128).all()
    assert (second[:, :20] == 128).all()
    assert (second[125:] == 128).all()
    assert (second[:, 100:] == 128).all()
    assert (second[25:125, 20:100] == image[..., ::-1]).all()
    # The crop is that of the image without the border, so it is black outside; the vector saw the grey.
    found_at_once = stand_in_pack().read(image)
    assert found_at_once is not None
    assert not found_at_once.padded
    assert (face.crop == found_at_once.crop).all()
    assert face.crop[0, 0].tolist() == [0, 0, 0]
    assert face.embedding[0] > found_at_once.embedding[0] + 5


def test_no_face_even_with_a_border(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    pack = stand_in_pack()
    assert pack.read(dotted(GREEN)) is None
    assert len(pack._detector.seen) == 2
    with pytest.raises(PhotoError, match="no face was found in the photo, also not with a grey border"):
        photo_embeddings(dotted(GREEN), pack)


def test_frames_without_a_face_are_skipped_and_not_punished(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    """16 frames, of which every second one shows nobody: the mean is over the other eight."""
    here, nobody = dotted((60, 120, 180), (40, 50, RED)), dotted((60, 120, 180))
    pack = stand_in_pack()
    photo = photo_embeddings(here, pack)
    found = face_embeddings(np.stack([here, nobody] * 8), pack)
    assert found.indices.tolist() == list(range(16))
    assert found.seen.tolist() == [True, False] * 8
    assert found.detection_rate == 0.5
    assert found.arc.shape == (8, 3)
    assert found.crops.shape == (8, 224, 224, 3)
    assert found.cur is None
    assert_close("the same face", face_similarity(photo.arc, found.arc), 1.0, FLOAT32)


def test_a_video_without_faces_has_0(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    pack = stand_in_pack()
    photo = photo_embeddings(dotted(GREEN, (40, 50, RED)), pack)
    found = face_embeddings(dotted(GREEN)[None], pack, torch.nn.Identity())
    assert found.detection_rate == 0.0
    assert face_similarity(photo.arc, found.arc) == 0.0
    assert found.cur is not None
    assert len(found.cur) == 0


def test_each_cosine_is_clipped_at_0_before_the_mean() -> None:
    photo = np.array([[1.0, 0.0]], np.float32)
    frames = np.array([[-3.0, 0.0], [0.0, 2.0], [5.0, 0.0], [1.0, 1.0]], np.float32)
    root = math.sqrt(0.5)
    assert_close("clipped", face_similarity(photo, frames), (0 + 0 + 1 + root) / 4, FLOAT32)
    assert_close("raw", face_similarity(photo, frames, clipped=False), (-1 + 0 + 1 + root) / 4, FLOAT32)


def test_a_matrix_compares_persons() -> None:
    vectors = np.array([[2.0, 0.0], [1.0, 1.0]], np.float32)
    expected = [[1.0, -1.0, math.sqrt(0.5)], [math.sqrt(0.5), -math.sqrt(0.5), 1.0]]
    others = np.array([[7.0, 0.0], [-1.0, 0.0], [0.5, 0.5]], np.float32)
    assert_close("cosines", cosine_matrix(vectors, others), expected, FLOAT32)
    with pytest.raises(InputError, match="length 0"):
        cosine_matrix(vectors, np.zeros((1, 2), np.float32))


def test_a_short_video_is_read_once_and_counted_as_published(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    """Of 3 frames, the first is sampled 8 times, the second 7 times and the last once."""
    here, nobody = dotted(GREEN, (40, 50, RED)), dotted(GREEN)
    pack = stand_in_pack()
    found = face_embeddings(np.stack([nobody, here, here]), pack)
    assert len(pack._detector.seen) == 4, "three frames, and one of them with a border"
    assert found.seen.sum() == 8
    everything = face_embeddings(np.stack([nobody, here, here]), pack, count=None)
    assert everything.indices.tolist() == [0, 1, 2]
    assert everything.detection_rate == 2 / 3


class Recorder(torch.nn.Module):
    """A backbone that keeps its input and gives its mean colours, three times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        self.seen.append(faces)
        return 3 * faces.mean(dim=(2, 3))


def test_curricular_face_sees_red_first_at_112_pixels_in_minus_1_to_1(
    stand_in_pack: Callable[..., FacePack], dotted: Callable[..., Image]
) -> None:
    backbone = Recorder()
    frames = np.stack([dotted((255, 0, 51), (40, 50, RED))] * 17)
    found = face_embeddings(frames, stand_in_pack(), backbone, count=None)
    assert [tuple(seen.shape) for seen in backbone.seen] == [(16, 3, 112, 112), (1, 3, 112, 112)]
    corner = backbone.seen[0][0, :, 20, 20]
    assert_close("pixels", corner, [1.0, -1.0, -0.6], FLOAT32)
    assert found.cur is not None
    assert found.cur.shape == (17, 3)
    assert_close("norms", np.linalg.norm(found.cur, axis=1), np.ones(17), FLOAT32)


@pytest.fixture(scope="module")
def pack(pack_folder: Path) -> FacePack:
    return FacePack(pack_folder)


def test_a_real_pack_agrees_with_insightface(pack: FacePack) -> None:
    """The vector and the 224 crop, against insightface's own alignment at the same landmarks."""
    from insightface.app.common import Face
    from insightface.utils import face_align

    image = np.array(draw_portrait(3, 320))
    face = pack.read(image)
    assert face is not None
    bgr = np.ascontiguousarray(image[..., ::-1])
    (landmarks,) = pack._detector.detect(bgr)[1]
    with pytest.warns(FutureWarning):
        vector = pack._recogniser.get(bgr, Face(kps=landmarks))
    with pytest.warns(FutureWarning):
        crop = face_align.norm_crop(bgr, landmark=landmarks, image_size=224)[..., ::-1]
    assert_close("ArcFace", face.embedding, vector, Tolerance(2e-3, "relative", "OpenCV warps in 1/32 pixel"))
    difference = np.abs(crop.astype(int) - face.crop)
    assert difference.mean() < 0.5, f"the crops differ by {difference.mean():.3f} levels"


def test_a_face_that_fills_the_photo_needs_the_border(pack: FacePack) -> None:
    """And the same person scores higher than another one, with a vector that saw the border."""
    x0, y0, x1, y1 = (int(edge) for edge in portrait_box(2, 320))
    whole = np.array(draw_portrait(2, 320))
    tight = np.ascontiguousarray(whole[y0:y1, x0:x1])
    face = pack.read(tight)
    assert face is not None
    assert face.padded
    others = [pack.read(image) for image in (whole, np.array(draw_portrait(5, 320)))]
    same, another = (cosine_matrix(face.embedding[None], f.embedding[None])[0, 0] for f in others if f)
    assert same > another


def test_half_packs_and_absent_providers_are_refused(tmp_path: Path, pack_folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no \*.onnx files; expected the insightface pack buffalo_l"
    ):
        FacePack(tmp_path / "nowhere")
    (tmp_path / "pack").mkdir()
    detector = pack_folder / "scrfd_tiny.onnx"
    (tmp_path / "pack" / detector.name).write_bytes(detector.read_bytes())
    with pytest.raises(CheckpointError, match="has no recogniser"):
        FacePack(tmp_path / "pack")
    (tmp_path / "pack" / detector.name).write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="can't be loaded as a face pack"):
        FacePack(tmp_path / "pack")
    with pytest.raises(BackendError, match="NoSuchExecutionProvider"):
        FacePack(pack_folder, providers=["NoSuchExecutionProvider"])


def test_images_of_another_kind_are_refused(stand_in_pack: Callable[..., FacePack]) -> None:
    image: Any = np.zeros((8, 8, 3), np.float32)
    with pytest.raises(InputError, match=r"expected RGB uint8 \[H, W, 3\]"):
        stand_in_pack().read(image)
