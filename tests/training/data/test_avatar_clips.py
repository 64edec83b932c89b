"""Drawn clips: every motion as often, nobody who is kept for the measures, photos in other colours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.training.avatars import (
    MOTIONS,
    background_colour,
    is_held_out,
    make_clip,
    make_pair,
    training_seed,
)
from proteus_deploy.training.data import avatar_clips
from proteus_deploy.training.data.avatar_clips import AvatarClips


def test_motions_and_people() -> None:
    loaders = [loader for _, loader in AvatarClips(64, first_person=5, clips_per_person=4, first_clip=2)]
    assert Counter(loader.motion for loader in loaders) == dict.fromkeys(MOTIONS, 8)
    assert {loader.identity_seed for loader in loaders} == {training_seed(5 + index) for index in range(16)}
    assert not any(is_held_out(loader.identity_seed) for loader in loaders)
    assert {loader.clip_seed for loader in loaders} == {2, 3, 4, 5}
    # The same clip of all people comes with every motion: neither decides the other.
    assert len({loader.motion for loader in loaders if loader.clip_seed == 2}) == 8
    assert len({name for name, _ in AvatarClips(64, clips_per_person=4)}) == 64


def test_a_clip_is_the_pair_that_the_avatars_draw() -> None:
    name, loader = list(AvatarClips(2, num_frames=5, size=32, photo_size=64, references=3))[1]
    sample = loader.load(lambda _: [])
    clip, photo = make_pair(training_seed(1), 0, motion="shake", num_frames=5, size=32, photo_size=64)
    assert name == sample.name == f"person {training_seed(1)} clip 0"
    assert np.array_equal(sample.frames, clip.frames)
    assert (sample.caption, sample.identity_caption) == (clip.prompt, clip.identity_prompt)
    assert sample.head_mask is not None
    assert np.array_equal(sample.head_mask, clip.head_mask)
    assert len(sample.references) == 3
    assert np.array_equal(sample.references[0], photo.image)
    assert len({image.tobytes() for image in sample.references}) == 3
    for image in sample.references:
        assert background_colour(image[None]) != background_colour(clip.frames)


def test_the_fingerprint_follows_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, loader = next(iter(AvatarClips(1)))
    first = loader.fingerprint()
    assert first == next(iter(AvatarClips(3)))[1].fingerprint()
    assert first != next(iter(AvatarClips(1, size=64)))[1].fingerprint()
    monkeypatch.setattr(avatar_clips, "_drawing_fingerprint", lambda: "people look otherwise now")
    assert loader.fingerprint() != first


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_fingerprint_knows_every_motion(motion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = avatar_clips._drawing_fingerprint.__wrapped__()

    def moved(identity: int, clip: int, **how: Any) -> Any:
        return make_clip(identity, clip + (how["motion"] == motion), **how)

    monkeypatch.setattr(avatar_clips, "make_clip", moved)
    assert avatar_clips._drawing_fingerprint.__wrapped__() != before


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="0 clips"):
        AvatarClips(0)
    with pytest.raises(InputError, match="references is 0"):
        AvatarClips(1, references=0)
