"""Measuring a whole video: values, reasons, and what raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_deploy.errors import InputError, PhotoError
from proteus_deploy.evaluate.clip_score import ClipEncoder, clip_score
from proteus_deploy.evaluate.encoders import Encoders
from proteus_deploy.evaluate.face_fid import FaceFeatures
from proteus_deploy.evaluate.face_similarity import FacePack
from proteus_deploy.evaluate.measure import measure_video, measure_with_reasons
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.evaluate.perceptual_distance import PerceptualDistance
from proteus_deploy.evaluate.pixel_metrics import psnr, ssim

Image = NDArray[np.uint8]
RED = (255, 0, 0)


class MeanColour(torch.nn.Module):
    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.mean(dim=(2, 3)) + 2


def to_the_right(frames: Image) -> NDArray[np.float32]:
    return np.tile(np.array([3, 0], np.float32), (len(frames) - 1, *frames.shape[1:3], 1))


@pytest.fixture
def encoders(stand_in_pack: Callable[..., FacePack], clip_folder: Path) -> Encoders:
    return Encoders(
        faces=stand_in_pack(),
        curricular=MeanColour(),
        clip=ClipEncoder(clip_folder),
        face_features=FaceFeatures(lambda images: images.mean(dim=(2, 3)), description="mean colour"),
        perceptual=PerceptualDistance(lambda images: [images], description="pixels"),
    )


@pytest.fixture
def inputs(dotted: Callable[..., Image], encoders: Encoders) -> dict[str, Any]:
    """Four frames, on the last of which there is no face."""
    frames = np.stack(
        [dotted((60, 120, 180), (40, 50, RED), size=(96, 80))] * 3 + [dotted((60, 120, 180), size=(96, 80))]
    )
    mask = np.zeros(frames.shape[:3], bool)
    mask[:, 20:80, 20:60] = True
    return {
        "frames": frames,
        "photo": dotted((60, 140, 200), (40, 50, RED)),
        "prompt": "a man waves",
        "person_mask": mask,
        "reference": 255 - frames,
        "encoders": encoders,
        "flow": to_the_right,
    }


def test_everything_given_gives_every_measure(inputs: dict[str, Any]) -> None:
    measured = measure_with_reasons(**inputs)
    assert measured.reasons == {}
    assert list(measured.values) == list(METRICS)
    values = measured.values
    frames, reference, clip = inputs["frames"], inputs["reference"], inputs["encoders"].clip
    assert values["face_detection_rate"] == 15 / 16
    assert values["face_sim_arc"] != values["face_sim_cur"]
    assert 0.9 < (values["face_sim_arc"] or 0) < 1
    assert (values["face_fid"] or 0) > 0
    assert values["clip_score"] == clip_score(frames, "a man waves", clip)
    assert values["clip_score_bgr"] == clip_score(frames, "a man waves", clip, as_published=True)
    assert values["clip_score"] != values["clip_score_bgr"]
    assert values["motion_person"] == values["motion_background"] == 3 * 480 / 96
    assert values["psnr"] == psnr(frames, reference)
    assert values["ssim"] == ssim(frames, reference)
    assert values["lpips"] == inputs["encoders"].perceptual(frames, reference)
    assert (values["lpips"] or 0) > 0.01
    assert 0.9 < (values["temporal_consistency"] or 0) < 1
    assert all(type(value) is float for value in values.values())


def test_frames_alone_give_reasons_and_no_substitutes(inputs: dict[str, Any]) -> None:
    measured = measure_with_reasons(inputs["frames"])
    assert set(measured.values.values()) == {None}
    assert list(measured.reasons) == list(METRICS)
    assert measured.reasons["face_sim_cur"] == "no photo was given"
    assert measured.reasons["clip_score"] == "no prompt was given"
    assert "neither person nor background" in measured.reasons["motion_background"]
    assert "the encoders have no part 'faces'" in measured.reasons["face_detection_rate"]
    del inputs["flow"]
    without = "no estimator of optical flow was given"
    reasons = measure_with_reasons(**inputs).reasons
    assert reasons == {"motion_person": without, "motion_background": without}


def test_a_part_that_is_missing_is_named(inputs: dict[str, Any], encoders: Encoders) -> None:
    inputs["encoders"] = Encoders(
        faces=encoders.faces, missing={"curricular": "FOLDER has no curricularface"}
    )
    measured = measure_with_reasons(**inputs)
    assert measured.values["face_sim_arc"] is not None
    assert measured.values["face_sim_cur"] is None
    assert measured.reasons["face_sim_cur"] == "FOLDER has no curricularface"


def test_what_is_asked_for_by_name_comes_or_raises(inputs: dict[str, Any]) -> None:
    assert list(measure_video(**inputs, metrics=["ssim", "psnr"])) == ["psnr", "ssim"]
    del inputs["prompt"]
    with pytest.raises(InputError, match=r"clip_score can't be measured: no prompt was given"):
        measure_video(**inputs, metrics=["psnr", "clip_score"])
    with pytest.raises(InputError, match="no measure 'fid'"):
        measure_video(**inputs, metrics=["fid"])
    assert measure_video(**inputs, metrics=[]) == {}


def test_a_photo_without_a_face_raises_even_when_nothing_was_named(
    inputs: dict[str, Any], dotted: Callable[..., Image]
) -> None:
    inputs["photo"] = dotted((60, 140, 200))
    with pytest.raises(PhotoError, match="no face was found in the photo"):
        measure_video(**inputs)


def test_a_video_without_a_face_has_likeness_0_and_no_face_distance(inputs: dict[str, Any]) -> None:
    """The published code writes a distance of 0, the best there is."""
    inputs["frames"] = inputs["reference"] = np.repeat(inputs["frames"][3:], 4, axis=0)
    measured = measure_with_reasons(**inputs)
    assert measured.values["face_sim_arc"] == measured.values["face_sim_cur"] == 0.0
    assert measured.values["face_detection_rate"] == 0.0
    assert measured.values["face_fid"] is None
    assert measured.reasons == {"face_fid": "no face was found on any of the sampled frames"}


def test_one_frame_has_no_motion_and_no_neighbours(inputs: dict[str, Any]) -> None:
    for name in ("frames", "reference", "person_mask"):
        inputs[name] = inputs[name][:1]
    measured = measure_with_reasons(**inputs)
    assert set(measured.reasons) == {"motion_person", "motion_background", "temporal_consistency"}


def test_masks_may_be_computed_and_must_fit(inputs: dict[str, Any]) -> None:
    mask = inputs["person_mask"]
    inputs["person_mask"] = lambda frames: np.ones(frames.shape[:3], bool)
    measured = measure_with_reasons(**inputs)
    assert measured.values["motion_person"] == 3 * 480 / 96
    assert measured.reasons == {"motion_background": "the mask leaves no pixel for the background"}
    for wrong in (mask[:3], mask.astype(np.uint8)):
        inputs["person_mask"] = wrong
        with pytest.raises(InputError, match=r"expected bool \[4, 96, 80\]"):
            measure_video(**inputs)


def test_a_reference_of_another_length_is_refused_at_once(inputs: dict[str, Any]) -> None:
    inputs["reference"] = inputs["reference"][:3]
    with pytest.raises(InputError, match="make both with one request"):
        measure_video(**inputs, metrics=["clip_score"])
