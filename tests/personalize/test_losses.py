"""Rewards and face crops: known values, OpenCV's pixels, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.identity.alignment import similarity_between
from proteus_deploy.personalize.face_crop import warp_faces
from proteus_deploy.personalize.rewards import identity_loss, semantic_loss


def test_identity_loss() -> None:
    reference = torch.tensor([3.0, 0.0])
    faces = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert identity_loss(reference, faces) == pytest.approx((0 + 1 + 2) / 3)
    faces.requires_grad_()
    identity_loss(reference, faces[1:2]).backward()
    assert faces.grad is not None
    assert faces.grad[1, 0] < 0, "a step downhill goes towards the reference"
    for wrong in (torch.zeros(0, 2), torch.zeros(2), torch.zeros(1, 3)):
        with pytest.raises(InputError, match="pass"):
            identity_loss(reference, wrong)


def test_semantic_loss() -> None:
    frozen = torch.tensor([0.0, math.log(3.0)])  # a quarter and three quarters
    assert semantic_loss(frozen + 7, frozen) == pytest.approx(0.0, abs=1e-6)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert semantic_loss(torch.zeros(2), frozen) == pytest.approx(expected)
    with pytest.raises(InputError, match="one of each frame"):
        semantic_loss(torch.zeros(2), torch.zeros(3))


def test_crops_are_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    rough = rng.random((9, 13, 3)).astype(np.float32)
    image = cv2.resize(rough, (130, 90), interpolation=cv2.INTER_CUBIC)
    landmarks = np.array([[40, 30], [80, 34], [60, 55], [45, 70], [75, 72]], dtype=np.float64)
    template = np.array([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], dtype=np.float64)
    warps = np.stack([similarity_between(landmarks, template), similarity_between(landmarks + 40, template)])
    expected = [cv2.warpAffine(image, warp, (112, 112), flags=cv2.INTER_LINEAR) for warp in warps]
    frames = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    found = warp_faces(frames, warps, 112).permute(0, 2, 3, 1).numpy()
    error = np.abs(found - np.stack(expected))
    assert error.max() < 1e-4


def test_gradients_reach_the_pixels_under_the_crop() -> None:
    frames = torch.zeros(1, 3, 8, 8, requires_grad=True)
    warp = torch.tensor([[[1.0, 0.0, -2.0], [0.0, 1.0, -3.0]]])  # the crop's corner is pixel x 2, y 3
    warp_faces(frames, warp, 2).sum().backward()
    assert frames.grad is not None
    assert {tuple(place) for place in (frames.grad[0, 0] > 0.01).nonzero().tolist()} == {
        (3, 2),
        (3, 3),
        (4, 2),
        (4, 3),
    }


@pytest.mark.parametrize(
    "warp",
    [torch.zeros(1, 2, 3), torch.full((1, 2, 3), math.nan), torch.zeros(2, 2, 3), torch.zeros(1, 3, 3)],
)
def test_warps_that_are_none(warp: torch.Tensor) -> None:
    with pytest.raises(InputError, match="warp"):
        warp_faces(torch.zeros(1, 3, 8, 8), warp, 4)
