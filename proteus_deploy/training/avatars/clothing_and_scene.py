"""What changes from clip to clip: clothes, background and framing, and the colours they come in."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BACKGROUND_COLOURS",
    "CLOTHES_COLOURS",
    "Scene",
    "background_colour",
    "clothes_colour",
    "nearest_colour",
]

Colour = tuple[int, int, int]

# Far enough apart to be told from each other in a small and noisy video; none of them is a skin tone.
CLOTHES_COLOURS: dict[str, Colour] = {
    "red": (198, 44, 48),
    "orange": (240, 138, 36),
    "yellow": (246, 208, 66),
    "green": (52, 140, 76),
    "blue": (46, 98, 190),
    "purple": (122, 66, 164),
    "white": (240, 242, 246),
    "black": (54, 54, 62),
}
BACKGROUND_COLOURS: dict[str, Colour] = {
    "blue": (136, 186, 226),
    "green": (152, 204, 150),
    "yellow": (246, 216, 96),
    "pink": (234, 132, 216),
    "purple": (170, 148, 216),
    "grey": (184, 188, 194),
    "teal": (60, 150, 152),
    "red": (190, 66, 58),
}
_GARMENTS = {
    "t-shirt": "a {} t-shirt",
    "sweater": "a {} v-neck sweater",
    "shirt": "a {} shirt",
    "striped top": "a striped {} top",
    "hoodie": "a {} hoodie",
}
_PLACES = {
    "room": "in a {} room",
    "wallpaper": "in front of striped {} wallpaper",
    "curtain": "in front of a {} curtain",
    "studio": "in a {} studio",
}


@dataclass(frozen=True)
class Scene:
    """Clothes, background and framing of one clip or photo.

    centre: where the head is at rest, in frame sizes. unit: half the width of an average head, in frame
    sizes. layout: 0..1, places the furniture of the background.
    """

    garment: str
    clothes_name: str
    place: str
    background_name: str
    centre: tuple[float, float]
    unit: float
    layout: float

    @classmethod
    def draw(cls, random_numbers: random.Random, *, unlike: Scene | None = None) -> Scene:
        """Any scene; with `unlike`, one whose clothes and background have other colours than that one's."""
        clothes = [name for name in CLOTHES_COLOURS if unlike is None or name != unlike.clothes_name]
        walls = [name for name in BACKGROUND_COLOURS if unlike is None or name != unlike.background_name]
        return cls(
            garment=random_numbers.choice(tuple(_GARMENTS)),
            clothes_name=random_numbers.choice(clothes),
            place=random_numbers.choice(tuple(_PLACES)),
            background_name=random_numbers.choice(walls),
            centre=(0.5 + random_numbers.uniform(-0.025, 0.025), 0.43 + random_numbers.uniform(-0.015, 0.02)),
            unit=random_numbers.uniform(0.176, 0.194),
            layout=random_numbers.random(),
        )

    @property
    def clothes(self) -> Colour:
        return CLOTHES_COLOURS[self.clothes_name]

    @property
    def background(self) -> Colour:
        return BACKGROUND_COLOURS[self.background_name]

    def clothing_words(self) -> str:
        """ "in a blue t-shirt" """
        words = _GARMENTS[self.garment].format(self.clothes_name)
        return f"in {_with_article(words)}"

    def place_words(self) -> str:
        """ "in a green room" """
        return _with_article(_PLACES[self.place].format(self.background_name))


def nearest_colour(colour: Colour | NDArray[np.float64], names: Mapping[str, Colour]) -> str:
    """The name whose colour is nearest to `colour` (RGB, 0..255), by hue and saturation before brightness."""
    import numpy as np

    def opponent(value: Colour | NDArray[np.float64]) -> NDArray[np.float64]:
        red, green, blue = (float(channel) for channel in value)
        # Shadows and lamps move brightness most, so it counts least.
        return np.array([red - green, (red + green) / 2 - blue, 0.35 * (red + green + blue) / 3])

    if not names:
        raise InputError("there are no colours to choose from; pass CLOTHES_COLOURS or BACKGROUND_COLOURS")
    wanted = opponent(colour)
    return min(names, key=lambda name: float(np.abs(opponent(names[name]) - wanted).sum()))


def background_colour(frames: NDArray[np.uint8]) -> str:
    """The colour name seen at the upper left and right of frames [F, H, W, 3], where only walls are."""
    import numpy as np

    height, width = frames.shape[1:3]
    edge = max(1, width // 8)
    top = frames[:, : height // 3]
    walls = np.concatenate([top[:, :, :edge], top[:, :, -edge:]], axis=2)
    return nearest_colour(np.median(walls.reshape(-1, 3), axis=0), BACKGROUND_COLOURS)


def clothes_colour(frames: NDArray[np.uint8]) -> str:
    """The colour name seen at the bottom of frames [F, H, W, 3], where only clothes are."""
    import numpy as np

    height, width = frames.shape[1:3]
    chest = frames[:, -max(1, height // 10) :, width * 3 // 8 : width * 5 // 8]
    return nearest_colour(np.median(chest.reshape(-1, 3), axis=0), CLOTHES_COLOURS)


def _with_article(words: str) -> str:
    return words.replace("a orange", "an orange")
