from __future__ import annotations

import pytest

from proteus_deploy.errors import InputError
from proteus_deploy.training.avatars import Identity, make_clip, make_photo
from proteus_deploy.training.tiny_model.descriptions import (
    ATTRIBUTES,
    UNKNOWN,
    Description,
    attribute_labels,
    describe_clip,
    describe_photo,
    prompts,
    written_labels,
)


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_words_are_those_of_the_drawn_clip(seed: int) -> None:
    clip = make_clip(seed, 3, num_frames=1, size=32)
    described = describe_clip(seed, 3)
    assert described.prompt == clip.prompt
    assert described.identity_prompt == clip.identity_prompt
    assert (described.identity, described.scene, described.movement) == (
        clip.identity,
        clip.scene,
        clip.movement,
    )


@pytest.mark.parametrize("seed", range(1000, 1004))
def test_words_are_those_of_the_drawn_photo(seed: int) -> None:
    photo = make_photo(seed, 1, size=32)
    described = describe_photo(seed, 1)
    assert described.prompt == photo.prompt
    assert described.identity == photo.identity


def test_every_drawn_person_has_a_label_for_each_attribute() -> None:
    found = [attribute_labels(describe_clip(seed, 0)) for seed in range(1000, 1400)]
    for name, classes in ATTRIBUTES.items():
        seen = {row[name] for row in found} - {UNKNOWN}
        # Each class occurs: a class with another spelling than the avatars' would raise or stay empty.
        assert seen == set(range(len(classes))), name


def _with(**traits: object) -> Description:
    """A clip of somebody with these traits."""
    for seed in range(1000, 6000):
        identity = Identity.from_seed(seed)
        if all(getattr(identity, name) == value for name, value in traits.items()):
            return describe_clip(seed, 0)
    raise AssertionError(f"nobody has {traits}")


def test_a_bald_head_has_no_hair_colour() -> None:
    labels = attribute_labels(_with(hair_style="bald"))
    assert labels["hair colour"] == UNKNOWN
    assert labels["hair style"] == ATTRIBUTES["hair style"].index("bald")


def test_a_photo_has_no_motion() -> None:
    assert attribute_labels(describe_photo(1000, 0))["motion"] == UNKNOWN


def test_written_labels_follow_the_words_and_not_the_person() -> None:
    hidden = next(
        description
        for description in (describe_clip(seed, 0) for seed in range(1000, 6000))
        if description.identity.glasses != "none" and "glasses" not in description.prompt
    )
    assert attribute_labels(hidden)["glasses"] != 0
    assert written_labels(hidden)["glasses"] == 0
    worn = _with(glasses="round", hat="none", facial_hair="none")
    assert written_labels(worn)["glasses"] == ATTRIBUTES["glasses"].index("round")
    assert written_labels(worn)["face shape"] == UNKNOWN


@pytest.mark.parametrize("attribute", ["clothes", "background", "hair colour"])
def test_recolouring_changes_one_colour_of_the_prompt(attribute: str) -> None:
    before = _with(hair_style="curly", hair_colour="brown")
    labels = attribute_labels(before)
    colour = next(c for i, c in enumerate(ATTRIBUTES[attribute]) if i != labels[attribute] and c != "orange")
    after = before.recoloured(attribute, colour)
    words, changed = before.prompt.split(), after.prompt.split()
    different = [new for old, new in zip(words, changed, strict=True) if old not in (new, "an")]
    assert different == [colour]
    assert attribute_labels(after) == {**labels, attribute: ATTRIBUTES[attribute].index(colour)}


def test_recolouring_refuses_what_has_no_colour() -> None:
    with pytest.raises(InputError, match="no colour"):
        describe_clip(1000, 0).recoloured("place", "room")
    with pytest.raises(InputError, match="teal"):
        describe_clip(1000, 0).recoloured("clothes", "teal")


def test_prompts_hold_a_clip_a_photo_and_the_looks_of_each_person() -> None:
    found = prompts(2)
    assert found[3] == describe_clip(1001, 0).prompt
    assert found[4] == describe_photo(1001, 0).prompt
    assert found[5] == describe_clip(1001, 0).identity_prompt
    assert len(found) == 6
