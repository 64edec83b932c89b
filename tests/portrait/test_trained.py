"""The trained tiny portrait model, as the package ships it."""

from __future__ import annotations

import numpy as np

from proteus_deploy.portrait.checkpoint import PortraitCheckpoint
from proteus_deploy.portrait.painter import TorchPainter
from proteus_deploy.portrait.plan import DENSE, CacheSettings
from proteus_deploy.tiny.trained import PORTRAIT
from proteus_deploy.training.avatars import background_colour, clothes_colour
from proteus_deploy.training.tiny_portrait.configs import CACHE, GPT, SAMPLING, VQ

CAPTIONS = [
    "a woman with long red hair in a green sweater in a purple studio",
    "a man with cropped brown hair and a beard in an orange hoodie in a blue studio",
]


def test_it_is_what_the_training_makes() -> None:
    checkpoint = PortraitCheckpoint.open(PORTRAIT)
    assert (checkpoint.gpt, checkpoint.vq) == (GPT, VQ)
    assert (checkpoint.sampling, checkpoint.cache) == (SAMPLING, CACHE)
    assert sum(file.stat().st_size for file in PORTRAIT.iterdir()) < 10_000_000


def test_clothes_and_walls_are_those_of_the_caption() -> None:
    """With the dense cache and with half of it; a model of this size misses one now and then."""
    painter = TorchPainter.open(PORTRAIT)
    for settings in (DENSE, CacheSettings("adsa", 0.5)):
        pictures = painter.draw(4 * CAPTIONS, cache=settings)
        # At a shoulder: in the middle, where drawn photos have nothing but clothes, a neck may come this low.
        clothes = [clothes_colour(np.roll(picture, 32, axis=1)[None]) for picture in pictures]
        walls = [background_colour(picture[None]) for picture in pictures]
        assert sum(map(str.__eq__, clothes, 4 * ["green", "orange"])) >= 6
        assert sum(map(str.__eq__, walls, 4 * ["purple", "blue"])) >= 6
