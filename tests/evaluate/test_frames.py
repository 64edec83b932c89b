"""Which frames the published protocols look at, and how float frames become bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.frames import (
    check_frames,
    check_pair,
    clip_samples,
    face_samples,
    frames_from_video,
)
from proteus_deploy.video import Video


def test_the_face_measures_look_from_the_first_frame_to_the_last() -> None:
    assert face_samples(17).tolist() == [*range(15), 16]
    expected = [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 32, 35, 38, 41, 44, 48]
    assert face_samples(49).tolist() == expected
    assert face_samples(5).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4]
    assert face_samples(1).tolist() == [0] * 16


def test_clip_score_looks_at_other_frames_and_never_at_the_last() -> None:
    assert clip_samples(17).tolist() == list(range(16))
    assert clip_samples(49).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45]
    assert clip_samples(1).tolist() == [0] * 16
    assert all(clip_samples(count).max() < count for count in range(1, 99))


def test_bytes_are_clipped_and_rounded_to_the_nearest() -> None:
    frames = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0]).reshape(1, 2, 3, 1, 1)
    found = frames_from_video(Video(frames, fps=8))
    assert found.dtype == np.uint8
    assert found.tolist() == [[[[0, 0, 0]]], [[[1, 255, 255]]]]
    assert found.flags["C_CONTIGUOUS"]


def test_colours_become_the_last_axis() -> None:
    frames = torch.zeros(1, 2, 3, 4, 5)
    frames[0, 1, 2, 3, 4] = 1
    found = frames_from_video(Video(frames, fps=8))
    assert found.shape == (2, 4, 5, 3)
    assert found[1, 3, 4, 2] == 255
    assert int(found.astype(int).sum()) == 255


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(frames: Any) -> None:
    with pytest.raises(InputError, match=r"expected RGB uint8 \[F, H, W, 3\]"):
        check_frames(frames)


def test_a_reference_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"frames are \[2, 8, 8, 3\] and the reference is \[3, 8, 8, 3\]"):
        check_pair(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 8, 8, 3), np.uint8))
