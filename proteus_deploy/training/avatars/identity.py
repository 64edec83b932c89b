"""Who a person is: every lasting trait, drawn from a seed. Clothes and background are not among them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FRINGED", "HAIR_COLOURS", "HAT_COLOURS", "Identity", "count_looks"]

Colour = tuple[int, int, int]

# From light to dark; a person's tone lies between two neighbours. The tiny detector knows skin by its colour,
# so no other table of this package holds such a tone.
_SKINS: tuple[Colour, ...] = (
    (255, 221, 194),
    (250, 210, 176),
    (236, 188, 148),
    (216, 162, 122),
    (190, 134, 98),
    (164, 112, 82),
    (146, 98, 72),
    (132, 88, 65),
)
HAIR_COLOURS: dict[str, Colour] = {
    "black": (44, 38, 42),
    "brown": (96, 56, 27),
    "red": (190, 74, 28),
    "blond": (226, 184, 92),
    "grey": (150, 152, 160),
    "white": (232, 234, 236),
    "pink": (232, 118, 172),
    "blue": (64, 96, 190),
}
_HAIR_WEIGHTS = {
    "black": 5.0, "brown": 5.0, "red": 3.0, "blond": 4.0, "grey": 0.6, "white": 0.3, "pink": 0.6, "blue": 0.5
}  # fmt: skip
_IRISES: dict[str, Colour] = {
    "brown": (104, 64, 36),
    "dark": (58, 38, 30),
    "blue": (62, 124, 190),
    "green": (74, 138, 82),
    "grey": (116, 130, 142),
    "hazel": (142, 104, 48),
}
HAT_COLOURS: dict[str, Colour] = {
    "red": (196, 48, 46),
    "blue": (52, 92, 176),
    "green": (58, 130, 78),
    "yellow": (240, 196, 48),
    "black": (48, 48, 54),
}
_FRAMES: dict[str, Colour] = {
    "black": (34, 34, 40), "red": (182, 40, 44), "gold": (196, 150, 40), "blue": (46, 84, 168)
}  # fmt: skip
_SHAPES = ("oval", "round", "square", "long", "heart")
_STYLES = {
    "woman": (
        "long", "wavy", "curly", "bob", "bun", "ponytail", "braids", "pixie", "afro", "short"
    ),
    "man": ("cropped", "short", "side-parted", "curly", "afro", "bald", "mohawk", "wavy", "bun"),
}  # fmt: skip
_FACIAL_HAIR = {"woman": ("none",), "man": ("none", "moustache", "goatee", "beard", "stubble")}
_HATS = ("none", "beanie", "cap", "headband")
_NO_HAT = ("afro", "bun", "mohawk")
FRINGED = ("long", "wavy", "bob", "ponytail", "pixie", "braids")
_PARTED = ("short", "side-parted", "pixie", "ponytail")
_GLASSES = ("none", "round", "square", "cat-eye")
_EARRINGS = {"woman": ("none", "studs", "hoops"), "man": ("none", "studs")}
_BROWS = ("thin", "medium", "bushy")
_NOSES = ("small", "straight", "broad")
_HAIR_WORDS = {
    "long": "long straight {} hair",
    "wavy": "long wavy {} hair",
    "curly": "curly {} hair",
    "bob": "a {} bob",
    "bun": "a {} hair bun",
    "ponytail": "a {} ponytail",
    "braids": "{} braids",
    "pixie": "a {} pixie cut",
    "afro": "a {} afro",
    "short": "short {} hair",
    "cropped": "cropped {} hair",
    "side-parted": "side-parted {} hair",
    "bald": "a bald head",
    "mohawk": "a {} mohawk",
}


@dataclass(frozen=True)
class Identity:
    """One person. Colours are RGB, 0..255; lengths are in half widths of an average head.

    `parting` is -1 or 1: the side on which hair is parted or a ponytail hangs.
    """

    seed: int
    kind: str
    older: bool
    skin: Colour
    face_shape: str
    face_width: float
    face_height: float
    jaw_taper: float
    squareness: float
    shoulders: float
    hair_style: str
    hair_colour: str
    hair: Colour
    hair_volume: float
    fringe: bool
    parting: int
    eye_colour: str
    iris: Colour
    eye_spacing: float
    eye_size: float
    eye_tilt: float
    brows: str
    brow_arch: float
    brow_height: float
    nose: str
    nose_width: float
    nose_length: float
    mouth_width: float
    lip_fullness: float
    smile: float
    lip_tint: float
    glasses: str
    frame: Colour
    facial_hair: str
    freckles: bool
    mole: int
    earrings: str
    hat: str
    hat_colour: str

    @classmethod
    def from_seed(cls, seed: int) -> Identity:
        """The same seed gives the same person, for ever; different seeds give different people."""
        draw = random.Random(f"avatar identity {seed}")
        kind = draw.choice(("woman", "man"))
        older = draw.random() < 0.16
        style = draw.choice(_STYLES[kind])
        colour = _weighted(draw, ("grey", "white") if older else tuple(HAIR_COLOURS))
        shape = draw.choice(_SHAPES)
        nose = draw.choice(_NOSES)
        glasses = draw.choice(_GLASSES[1:]) if draw.random() < 0.34 else "none"
        tone = draw.uniform(0, len(_SKINS) - 1)
        iris = draw.choice(tuple(_IRISES))
        hat = draw.choice(_HATS[1:]) if style not in _NO_HAT and draw.random() < 0.2 else "none"
        widths = {"oval": 0.98, "round": 1.04, "square": 1.01, "long": 0.95, "heart": 1.0}
        heights = {"oval": 1.36, "round": 1.27, "square": 1.33, "long": 1.39, "heart": 1.35}
        tapers = {"oval": 0.15, "round": 0.1, "square": 0.06, "long": 0.12, "heart": 0.21}
        nose_widths = {"small": 0.12, "straight": 0.15, "broad": 0.21}
        return cls(
            seed=seed,
            kind=kind,
            older=older,
            skin=_between(_SKINS, tone),
            face_shape=shape,
            face_width=widths[shape] + draw.uniform(-0.02, 0.02),
            face_height=heights[shape] + draw.uniform(-0.03, 0.03),
            jaw_taper=tapers[shape] + draw.uniform(-0.02, 0.02),
            squareness=0.75 if shape == "square" else draw.uniform(0.0, 0.25),
            shoulders=(1.95 if kind == "woman" else 2.25) + draw.uniform(-0.1, 0.1),
            hair_style=style,
            hair_colour=colour,
            hair=_jitter(draw, HAIR_COLOURS[colour], 0.08),
            hair_volume=draw.uniform(0.85, 1.15),
            fringe=draw.random() < 0.4,
            parting=draw.choice((-1, 1)),
            eye_colour=iris,
            iris=_IRISES[iris],
            eye_spacing=draw.uniform(0.39, 0.45),
            # Eyes look smaller behind lenses, and frames need room.
            eye_size=draw.uniform(0.87, 1.07) * (0.92 if glasses != "none" else 1.0),
            eye_tilt=draw.uniform(-0.03, 0.05),
            brows=draw.choice(_BROWS),
            brow_arch=draw.uniform(0.04, 0.12),
            brow_height=draw.uniform(0.27, 0.34),
            nose=nose,
            nose_width=nose_widths[nose] + draw.uniform(-0.015, 0.015),
            nose_length=draw.uniform(0.41, 0.49),
            mouth_width=draw.uniform(0.29, 0.4),
            lip_fullness=draw.uniform(0.75, 1.3) * (1.1 if kind == "woman" else 0.85),
            smile=draw.uniform(0.03, 0.11),
            lip_tint=draw.uniform(0.35, 1.0) if kind == "woman" else draw.uniform(0.0, 0.25),
            glasses=glasses,
            frame=_FRAMES[draw.choice(tuple(_FRAMES))],
            facial_hair=draw.choice(_FACIAL_HAIR[kind]),
            freckles=draw.random() < 0.2,
            mole=draw.choice((-1, 1)) if draw.random() < 0.12 else 0,
            earrings=draw.choice(_EARRINGS[kind]),
            hat=hat,
            hat_colour=draw.choice(tuple(HAT_COLOURS)),
        )

    def identity_prompt(self) -> str:
        """Looks only, at most twelve words: "a woman with curly red hair and round glasses"."""
        hair = _HAIR_WORDS[self.hair_style].format(self.hair_colour)
        # A beard is short for its size, so it goes first; what no longer fits in twelve words is left out.
        others = []
        if self.hat != "none":
            others.append(f"a {self.hat_colour} {self.hat}")
        if self.facial_hair != "none":
            others.append(self.facial_hair if self.facial_hair == "stubble" else f"a {self.facial_hair}")
        if self.glasses != "none":
            others.append(f"{self.glasses} glasses")
        if self.freckles:
            others.append("freckles")
        if self.earrings == "hoops":
            others.append("hoop earrings")
        start = f"an older {self.kind}" if self.older else f"a {self.kind}"
        phrase = f"{start} with {hair}"
        for count in range(1, len(others) + 1):
            longer = f"{start} with {_listed([hair, *others[:count]])}"
            if len(longer.split()) > 12:
                break
            phrase = longer
        return phrase


def count_looks() -> int:
    """Combinations of the traits that are drawn from lists (hair colours but not their shades, and so on).

    Skin counts with its eight anchors. Eyes, nose, mouth, face and hair volume have fifteen continuous
    parameters more, which are not counted.
    """
    total = 0
    for kind, styles in _STYLES.items():
        for style in styles:
            hats = 1 if style in _NO_HAT else 1 + (len(_HATS) - 1) * len(HAT_COLOURS)
            # Hair that isn't there has no colour; fringe and parting count where they are seen.
            hair = 1 if style == "bald" else len(HAIR_COLOURS)
            hair *= (2 if style in FRINGED else 1) * (2 if style in _PARTED else 1)
            face = len(_SHAPES) * len(_SKINS) * len(_IRISES) * len(_BROWS) * len(_NOSES)
            worn = 1 + (len(_GLASSES) - 1) * len(_FRAMES)
            marks = 2 * 3  # freckles or not; a mole on the left, the right, or none
            total += hats * hair * face * worn * marks * len(_FACIAL_HAIR[kind]) * len(_EARRINGS[kind])
    return total


def _weighted(draw: random.Random, names: Sequence[str]) -> str:
    return draw.choices(names, [_HAIR_WEIGHTS[name] for name in names])[0]


def _between(anchors: Sequence[Colour], position: float) -> Colour:
    low = min(math.floor(position), len(anchors) - 2)
    part = position - low
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(anchors[low], anchors[low + 1], strict=True)
    )
    return red, green, blue


def _jitter(draw: random.Random, colour: Colour, amount: float) -> Colour:
    """The colour somewhat brighter or darker; its hue stays, so that its name does."""
    factor = 1 + draw.uniform(-amount, amount)
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
