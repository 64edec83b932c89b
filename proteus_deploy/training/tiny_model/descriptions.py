"""What drawn clips and photos show, in words and as labels, without drawing them.

Drawing takes most of the time of a data set; prompts and labels follow from the seeds alone. The order of the
draws is that of `avatars/clip.py`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from proteus_deploy.errors import InputError
from proteus_deploy.training.avatars import (
    BACKGROUND_COLOURS,
    CLOTHES_COLOURS,
    MOTIONS,
    Identity,
    Motion,
    Scene,
    training_seed,
)
from proteus_deploy.training.avatars.identity import HAIR_COLOURS

__all__ = [
    "ATTRIBUTES",
    "UNKNOWN",
    "Description",
    "attribute_labels",
    "describe_clip",
    "describe_photo",
    "prompts",
    "written_labels",
]

# A label that says nothing: torch's cross entropy leaves it out.
UNKNOWN = -100

# Attribute -> its classes; a label is a place in this tuple.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "kind": ("woman", "man"),
    "age": ("younger", "older"),
    "hair style": (
        "long", "wavy", "curly", "bob", "bun", "ponytail", "braids", "pixie", "afro", "short", "cropped",
        "side-parted", "bald", "mohawk",
    ),
    "hair colour": tuple(HAIR_COLOURS),
    "hat": ("none", "beanie", "cap", "headband"),
    "glasses": ("none", "round", "square", "cat-eye"),
    "facial hair": ("none", "moustache", "goatee", "beard", "stubble"),
    "face shape": ("oval", "round", "square", "long", "heart"),
    "garment": ("t-shirt", "sweater", "shirt", "striped top", "hoodie"),
    "clothes": tuple(CLOTHES_COLOURS),
    "place": ("room", "wallpaper", "curtain", "studio"),
    "background": tuple(BACKGROUND_COLOURS),
    "motion": tuple(MOTIONS),
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """Who is seen where, and doing what; `movement` is None for a photo."""

    identity: Identity
    scene: Scene
    movement: Motion | None = None

    @property
    def identity_prompt(self) -> str:
        return self.identity.identity_prompt()

    @property
    def prompt(self) -> str:
        words = [self.identity_prompt, self.scene.clothing_words()]
        if self.movement is not None:
            words.append(self.movement.words(self.identity.kind))
        return " ".join([*words, self.scene.place_words()])

    def recoloured(self, attribute: str, colour: str) -> Description:
        """The same picture but for one colour: of "clothes", the "background" or the "hair colour".

        Raises InputError for another attribute or a colour that the attribute doesn't have.
        """
        if colour not in ATTRIBUTES.get(attribute, ()):
            raise InputError(f"there is no {colour!r} for {attribute!r}; see ATTRIBUTES")
        if attribute == "clothes":
            return replace(self, scene=replace(self.scene, clothes_name=colour))
        if attribute == "background":
            return replace(self, scene=replace(self.scene, background_name=colour))
        if attribute == "hair colour":
            return replace(self, identity=replace(self.identity, hair_colour=colour))
        raise InputError(f"{attribute!r} is no colour; choose clothes, background or hair colour")


def describe_clip(identity_seed: int, clip_seed: int) -> Description:
    """What `make_clip(identity_seed, clip_seed)` shows."""
    draw = random.Random(f"avatar clip {identity_seed} {clip_seed}")
    scene = Scene.draw(draw)
    return Description(Identity.from_seed(identity_seed), scene, Motion.draw(draw))


def describe_photo(identity_seed: int, photo_seed: int) -> Description:
    """What `make_photo(identity_seed, photo_seed)` shows."""
    draw = random.Random(f"avatar photo {identity_seed} {photo_seed}")
    return Description(Identity.from_seed(identity_seed), Scene.draw(draw))


def attribute_labels(description: Description) -> dict[str, int]:
    """The class of each attribute that can be seen; UNKNOWN for what a bald head or a photo doesn't have."""
    identity, scene, movement = description.identity, description.scene, description.movement
    found = {
        "kind": identity.kind,
        "age": "older" if identity.older else "younger",
        "hair style": identity.hair_style,
        "hair colour": None if identity.hair_style == "bald" else identity.hair_colour,
        "hat": identity.hat,
        "glasses": identity.glasses,
        "facial hair": identity.facial_hair,
        "face shape": identity.face_shape,
        "garment": scene.garment,
        "clothes": scene.clothes_name,
        "place": scene.place,
        "background": scene.background_name,
        "motion": None if movement is None else movement.kind,
    }
    return {
        name: UNKNOWN if value is None else ATTRIBUTES[name].index(value) for name, value in found.items()
    }


def written_labels(description: Description) -> dict[str, int]:
    """As `attribute_labels`, of what the prompt says: "none" for a beard that found no room in it.

    The shape of the face is never written.
    """
    labels = attribute_labels(description)
    labels["face shape"] = UNKNOWN
    identity = description.identity
    words = {
        "hat": identity.hat,
        "glasses": f"{identity.glasses} glasses",
        "facial hair": identity.facial_hair,
    }
    for name, word in words.items():
        if word not in description.identity_prompt:
            labels[name] = 0
    return labels


def prompts(people: int) -> list[str]:
    """Prompts of one clip and one photo of each of the first training people, and their identity prompts."""
    found = []
    for index in range(people):
        seed = training_seed(index)
        clip = describe_clip(seed, 0)
        found += [clip.prompt, describe_photo(seed, 0).prompt, clip.identity_prompt]
    return found
