from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proteus_deploy.training.avatars import make_clip, training_seed
from proteus_deploy.training.tiny_model import drawn_clips
from proteus_deploy.training.tiny_model.drawn_clips import draw_aligned_photos, draw_clips


def test_clips_are_those_of_the_training_people_and_are_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, parts = draw_clips(tmp_path, 2, processes=1)
    clip = make_clip(training_seed(1), 0)
    assert np.array_equal(frames[1], clip.frames)
    assert np.array_equal(parts[1] == 3, clip.face_mask)
    assert np.array_equal(parts[1] >= 2, clip.head_mask)
    assert np.array_equal(parts[1] >= 1, clip.person_mask)
    monkeypatch.setattr(drawn_clips, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("drawn again"))
    again, _ = draw_clips(tmp_path, 2, processes=1)
    assert np.array_equal(again, frames)


def test_aligned_photos_show_the_head_on_white(tmp_path: Path) -> None:
    photos = draw_aligned_photos(tmp_path, 1, side=48, processes=1)
    assert photos.shape == (1, 48, 48, 3)
    assert photos.dtype == np.uint8
    assert (photos[0, -1, [0, -1]] == 255).all()  # lower corners: clothes and wall are gone
    assert (photos[0, 20:28, 20:28] < 250).any()  # the face is there
