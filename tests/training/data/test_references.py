"""Reference photos come from outside the clip, show one person, and hold the whole head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_deploy.identity.faces import Face
from proteus_deploy.training.data.references import (
    check_faces,
    choose_references,
    cut_head,
    frames_to_look_at,
)
from proteus_deploy.training.data.report import ClipRejected, Note, Reason
from proteus_deploy.training.data.video_frames import ClipFrames, VideoOptions

OPTIONS = VideoOptions(references=2)
INSIDE_TOO = replace(OPTIONS, allow_reference_inside_clip=True)


def face(x: float = 100, y: float = 100, side: float = 40, score: float = 0.95) -> Face:
    return Face((x, y, x + side, y + side), score, np.zeros((5, 2), np.float32))


def picture(grey: int) -> NDArray[np.uint8]:
    return np.full((240, 320, 3), grey, np.uint8)


def test_candidates_lie_outside_and_counting_inside() -> None:
    frames = ClipFrames(tuple(range(20, 68, 3)), (*range(7, 20), *range(66, 80)))
    inside, outside = frames_to_look_at(frames, OPTIONS)
    assert len(inside) == 5
    assert set(inside) <= set(frames.clip)
    assert len(outside) == 6
    assert set(outside) <= set(frames.outside)
    assert min(outside) < frames.clip[0]
    assert max(outside) > frames.clip[-1]


def test_one_person_is_wanted() -> None:
    check_faces({3: [face()], 9: []}, OPTIONS)
    # Unsure and small ones are no second person.
    check_faces({3: [face(), face(200, score=0.89), face(250, side=19)]}, OPTIONS)
    with pytest.raises(ClipRejected, match="frame 9 of the video shows 2") as caught:
        check_faces({3: [face()], 9: [face(), face(200, side=20)]}, OPTIONS)
    assert caught.value.reason == Reason.SEVERAL_FACES
    with pytest.raises(ClipRejected, match=r"frames 3, 9 .* at least 0.9, the best has 0.89") as caught:
        check_faces({3: [face(score=0.89)], 9: []}, OPTIONS)
    assert caught.value.reason == Reason.NO_FACE


def test_photos_come_from_outside() -> None:
    outside = {
        1: (picture(1), [face(side=31)]),  # smaller than the identity encoder takes
        2: (picture(2), [face()]),
        3: (picture(3), [face(), face(200)]),
        4: (picture(4), [face()]),
        80: (picture(80), [face()]),
        81: (picture(81), [face(score=0.5)]),
    }
    photos, notes = choose_references(outside, {20: (picture(20), [face()])}, INSIDE_TOO)
    assert [int(photo[0, 0, 0]) for photo in photos] == [2, 80]
    assert notes == ()


def test_photos_from_inside_only_where_allowed() -> None:
    outside = {2: (picture(2), [face(score=0.7)])}
    inside = {20: (picture(20), [face()])}
    with pytest.raises(ClipRejected, match="allow_reference_inside_clip") as caught:
        choose_references(outside, inside, OPTIONS)
    assert caught.value.reason == Reason.NO_REFERENCE
    photos, notes = choose_references(outside, inside, INSIDE_TOO)
    assert [int(photo[0, 0, 0]) for photo in photos] == [20]
    assert notes == (Note.REFERENCE_INSIDE,)
    with pytest.raises(ClipRejected):
        choose_references(outside, {20: (picture(20), [])}, INSIDE_TOO)


def test_the_head_is_cut_out_with_its_margin() -> None:
    rows = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 320, 3))
    # Face 40 high: a head of 1.55 x 40 = 62 from 84 to 146, 20 % more: 74 from 78 to 152.
    cut = cut_head(rows, face(), OPTIONS)
    assert cut.shape == (74, 74, 3)
    assert (cut[0, 0, 0], cut[-1, 0, 0]) == (78, 151)
    # At the border there is less, never something from the other side.
    assert cut_head(rows, face(0, 0), OPTIONS).shape == (52, 57, 3)
    assert cut_head(rows, face(), replace(OPTIONS, reference_size=37)).shape == (37, 37, 3)
