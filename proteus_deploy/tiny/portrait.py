"""Draw a head-and-shoulders portrait from a seed: a reference photo that belongs to nobody.

Everything is placed in units of the head: (0, 0) is its centre, x = 1 its right edge, y = 1 its chin. The
proportions are those of the alignment template, so an aligned crop of a drawn face looks like one of a photo.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from proteus_deploy.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HEAD_ASPECT", "LANDMARKS", "draw_portrait", "portrait_box", "portrait_landmarks"]

Colour = tuple[int, int, int]
Point = tuple[float, float]

# Height of a head over its width.
HEAD_ASPECT = 1.36
# Eyes, nose tip and mouth corners in head units.
LANDMARKS: tuple[Point, ...] = ((-0.42, -0.02), (0.42, -0.02), (0.0, 0.34), (-0.37, 0.62), (0.37, 0.62))

_SUPERSAMPLING = 3
_SMALLEST = 32
# The tiny detector tells skin from everything else by its colour, so no other list holds a skin tone.
_SKINS: tuple[Colour, ...] = (
    (255, 224, 196),
    (246, 204, 166),
    (229, 178, 136),
    (204, 146, 106),
    (168, 114, 82),
    (140, 92, 66),
)
_HAIRS: tuple[Colour, ...] = (
    (40, 32, 30),
    (62, 42, 32),
    (78, 50, 34),
    (150, 74, 34),
    (208, 166, 86),
    (140, 140, 148),
)
_IRISES: tuple[Colour, ...] = ((84, 56, 36), (70, 104, 146), (78, 112, 84), (98, 92, 66))
_CLOTHES: tuple[Colour, ...] = (
    (44, 62, 98),
    (38, 108, 112),
    (72, 106, 78),
    (120, 38, 56),
    (62, 64, 72),
    (206, 158, 48),
    (228, 232, 238),
)
_BACKGROUNDS: tuple[Colour, ...] = (
    (190, 209, 224),
    (200, 216, 204),
    (212, 206, 224),
    (176, 196, 204),
    (216, 219, 221),
)


@dataclass(frozen=True)
class _Look:
    centre: Point
    half_width: float
    skin: Colour
    hair: Colour
    iris: Colour
    clothes: Colour
    background: Colour
    long_hair: bool
    parting: float
    brow_lift: float
    eye_openness: float
    smile: float
    lip: float
    v_neck: bool
    freckles: bool


def _look(seed: int) -> _Look:
    choice = random.Random(seed)
    return _Look(
        centre=(0.5 + choice.uniform(-0.02, 0.02), 0.43 + choice.uniform(-0.015, 0.015)),
        half_width=choice.uniform(0.152, 0.172),
        skin=choice.choice(_SKINS),
        hair=choice.choice(_HAIRS),
        iris=choice.choice(_IRISES),
        clothes=choice.choice(_CLOTHES),
        background=choice.choice(_BACKGROUNDS),
        long_hair=choice.random() < 0.5,
        parting=choice.choice((-1, 1)) * choice.uniform(0.15, 0.5),
        brow_lift=choice.uniform(-0.02, 0.03),
        eye_openness=choice.uniform(0.085, 0.11),
        smile=choice.uniform(0.02, 0.08),
        lip=choice.uniform(0.05, 0.075),
        v_neck=choice.random() < 0.5,
        freckles=choice.random() < 0.25,
    )


def draw_portrait(seed: int, size: int = 512) -> Image.Image:
    """An RGB image of `size` x `size` pixels; the same seed gives the same person, and the same bytes."""
    if size < _SMALLEST:
        raise InputError(f"a portrait of {size} pixels shows nothing; choose at least {_SMALLEST}")
    return (
        _Painter(_look(seed), size * _SUPERSAMPLING, seed).paint().resize((size, size), Image.Resampling.BOX)
    )


def portrait_landmarks(seed: int, size: int = 512) -> NDArray[np.float32]:
    """Eyes, nose tip and mouth corners of `draw_portrait(seed, size)`: float32 [5, 2], x, y in pixels."""
    import numpy as np

    look = _look(seed)
    return np.array([_place(look, size, point) for point in LANDMARKS], dtype=np.float32)


def portrait_box(seed: int, size: int = 512) -> tuple[float, float, float, float]:
    """The head of `draw_portrait(seed, size)`, hair included: x0, y0, x1, y1 in pixels."""
    look = _look(seed)
    return (*_place(look, size, (-1, -1)), *_place(look, size, (1, 1)))


def _place(look: _Look, size: float, point: Point) -> Point:
    return (
        (look.centre[0] + point[0] * look.half_width) * size,
        (look.centre[1] + point[1] * look.half_width * HEAD_ASPECT) * size,
    )


def _shade(colour: Colour, factor: float) -> Colour:
    """Darker (factor < 1) or nearer to white (factor > 1, by the part above 1)."""
    if factor <= 1:
        red, green, blue = (round(value * factor) for value in colour)
    else:
        red, green, blue = (round(value + (255 - value) * (factor - 1)) for value in colour)
    return red, green, blue


def _curve(points: Sequence[Point], steps: int = 24) -> list[Point]:
    """A Bézier curve through its end points, drawn towards the points between."""
    curve = []
    degree = len(points) - 1
    for step in range(steps + 1):
        t = step / steps
        weights = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
        curve.append(
            (
                sum(weight * point[0] for weight, point in zip(weights, points, strict=True)),
                sum(weight * point[1] for weight, point in zip(weights, points, strict=True)),
            )
        )
    return curve


def _oval(centre: Point, radii: Point, taper: float = 0.0) -> list[Point]:
    """An ellipse whose lower half grows narrower by `taper`, as a jaw does."""
    outline = []
    for step in range(96):
        angle = 2 * math.pi * step / 96
        narrow = 1 - taper * max(0.0, math.sin(angle)) ** 1.6
        outline.append(
            (centre[0] + radii[0] * math.cos(angle) * narrow, centre[1] + radii[1] * math.sin(angle))
        )
    return outline


class _Painter:
    def __init__(self, look: _Look, size: int, seed: int) -> None:
        self.look, self.size = look, size
        self.image = Image.new("RGB", (size, size), look.background)
        self.grains = random.Random(seed + 1)

    def paint(self) -> Image.Image:
        self._background()
        self._back_hair()
        self._body()
        self._head()
        self._eyes_and_brows()
        self._nose()
        self._mouth()
        self._front_hair()
        return self.image

    def _points(self, points: Sequence[Point]) -> list[Point]:
        return [_place(self.look, self.size, point) for point in points]

    def _fill(self, outline: Sequence[Point], colour: Colour) -> None:
        ImageDraw.Draw(self.image).polygon(self._points(outline), fill=colour)

    def _mask(self, outline: Sequence[Point]) -> Image.Image:
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon(self._points(outline), fill=255)
        return mask

    def _soft(
        self,
        outline: Sequence[Point],
        colour: Colour,
        strength: float,
        blur: float,
        within: Image.Image | None = None,
    ) -> None:
        """A soft-edged, half-transparent shape; `blur` in head widths, `within` a mask that bounds it."""
        radius = blur * self.look.half_width * self.size
        points = self._points(outline)
        # Blurring the whole canvas for a cheek would take most of the time.
        reach = math.ceil(3 * radius) + 1
        box = (
            max(0, math.floor(min(x for x, _ in points)) - reach),
            max(0, math.floor(min(y for _, y in points)) - reach),
            min(self.size, math.ceil(max(x for x, _ in points)) + reach),
            min(self.size, math.ceil(max(y for _, y in points)) + reach),
        )
        mask = Image.new("L", (box[2] - box[0], box[3] - box[1]), 0)
        ImageDraw.Draw(mask).polygon([(x - box[0], y - box[1]) for x, y in points], fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(radius))
        mask = mask.point([round(value * strength) for value in range(256)])
        if within is not None:
            mask = ImageChops.multiply(mask, within.crop(box))
        self.image.paste(colour, box, mask)

    def _stroke(self, points: Sequence[Point], colour: Colour, widths: tuple[float, float, float]) -> None:
        """A line whose half width, in head units of y, runs over the three values from end to end."""
        line = _curve(points)
        rims: tuple[list[Point], list[Point]] = ([], [])
        for index, (x, y) in enumerate(line):
            t = index / (len(line) - 1)
            half = widths[0] * (1 - t) ** 2 + 2 * widths[1] * t * (1 - t) + widths[2] * t**2
            rims[0].append((x, y - half))
            rims[1].append((x, y + half))
        self._fill([*rims[0], *reversed(rims[1])], colour)

    def _background(self) -> None:
        self._soft(_oval((0, -0.2), (2.2, 1.9)), _shade(self.look.background, 1.45), 0.9, 0.9)

    def _back_hair(self) -> None:
        dark = _shade(self.look.hair, 0.8)
        if self.look.long_hair:
            left = _curve([(0.0, -1.25), (-1.6, -1.3), (-1.2, 0.3), (-1.42, 1.55)])
            bottom = _curve([(-1.42, 1.55), (-0.6, 1.75), (0.6, 1.75), (1.42, 1.55)])
            right = _curve([(1.42, 1.55), (1.2, 0.3), (1.6, -1.3), (0.0, -1.25)])
            self._fill([*left, *bottom, *right], dark)
        else:
            self._fill(_oval((0, -0.32), (1.1, 0.88)), dark)

    def _body(self) -> None:
        look = self.look
        neck = [(-0.5, 0.5), (0.5, 0.5), (0.56, 1.6), (-0.56, 1.6)]
        self._fill(neck, _shade(look.skin, 0.88))
        self._soft(_oval((0, 0.72), (0.72, 0.42)), _shade(look.skin, 0.62), 0.6, 0.1, self._mask(neck))
        bottom = 3.2
        opening = (
            _curve([(0.62, 1.28), (0.3, 1.55), (0.0, 1.95)])
            + _curve([(0.0, 1.95), (-0.3, 1.55), (-0.62, 1.28)])
            if look.v_neck
            else _curve([(0.6, 1.28), (0.42, 1.62), (-0.42, 1.62), (-0.6, 1.28)])
        )
        if look.v_neck:
            self._fill(
                [(-0.6, 1.25), (0.6, 1.25), (0.3, 1.7), (0.0, 2.0), (-0.3, 1.7)], _shade(look.skin, 0.92)
            )
        left = _curve([(-0.62, 1.28), (-1.25, 1.45), (-2.1, 1.55), (-2.5, bottom)])
        right = _curve([(2.5, bottom), (2.1, 1.55), (1.25, 1.45), (0.62, 1.28)])
        clothes = [*left, *right, *opening]
        self._fill(clothes, look.clothes)
        within = self._mask(clothes)
        for side in (-1, 1):
            fold = [(side * x, y) for x, y in ((1.3, 2.0), (1.42, 2.1), (1.55, 3.3), (1.3, 3.3))]
            self._soft(fold, _shade(look.clothes, 0.7), 0.3, 0.06, within)
        rim = list(opening)
        ImageDraw.Draw(self.image).line(
            self._points(rim),
            fill=_shade(look.clothes, 0.78),
            width=max(1, round(0.07 * look.half_width * self.size)),
            joint="curve",
        )

    def _head(self) -> None:
        look = self.look
        for side in (-1, 1):
            self._fill(_oval((side * 0.98, 0.08), (0.13, 0.17)), _shade(look.skin, 0.92))
            self._soft(_oval((side * 1.0, 0.08), (0.06, 0.1)), _shade(look.skin, 0.7), 0.5, 0.03)
        outline = _oval((0, 0), (1, 1), taper=0.2)
        self._fill(outline, look.skin)
        within = self._mask(outline)
        edge = ImageChops.subtract(within, self._mask(_oval((-0.1, -0.06), (0.9, 0.93), taper=0.2)))
        edge = edge.filter(ImageFilter.GaussianBlur(0.12 * look.half_width * self.size))
        self.image.paste(_shade(look.skin, 0.8), (0, 0), ImageChops.multiply(edge, within))
        self._soft(_oval((-0.25, -0.3), (0.4, 0.3)), _shade(look.skin, 1.3), 0.5, 0.2, within)
        red, green, blue = look.skin
        blush: Colour = (min(255, red + 6), round(green * 0.84), round(blue * 0.84))
        for side in (-1, 1):
            self._soft(_oval((side * 0.56, 0.3), (0.2, 0.11)), blush, 0.6, 0.1, within)
        if look.freckles:
            for _ in range(26):
                x, y = self.grains.uniform(-0.6, 0.6), self.grains.uniform(0.12, 0.36)
                self._fill(_oval((x, y), (0.015, 0.011)), _shade(look.skin, 0.78))

    def _eyes_and_brows(self) -> None:
        look = self.look
        height = look.eye_openness
        for side in (-1, 1):
            x, y = 0.42 * side, -0.02
            inner, outer = (x - side * 0.2, y + 0.02), (x + side * 0.22, y - 0.005)
            upper = _curve(
                [inner, (x - side * 0.08, y - 2 * height), (x + side * 0.12, y - 1.9 * height), outer]
            )
            lower = _curve(
                [outer, (x + side * 0.1, y + 1.3 * height), (x - side * 0.1, y + 1.3 * height), inner]
            )
            self._soft(_oval((x, y - 0.03), (0.27, 0.13)), _shade(look.skin, 0.72), 0.5, 0.06)
            white = [*upper, *lower]
            self._fill(white, (248, 248, 246))
            within = self._mask(white)
            eye = self.image.copy()
            pen = ImageDraw.Draw(eye)
            radius = 0.122
            # Head units are taller than wide: dividing by the aspect keeps the iris round.
            for scale, colour in ((1.0, _shade(look.iris, 0.6)), (0.82, look.iris), (0.46, (22, 18, 18))):
                disc = _oval((x, y - 0.005), (radius * scale, radius * scale / HEAD_ASPECT))
                pen.polygon(self._points(disc), fill=colour)
            pen.polygon(self._points(_oval((x - 0.04, y - 0.04), (0.032, 0.024))), fill=(255, 255, 255))
            self.image.paste(eye, (0, 0), within)
            self._soft([*upper, (outer[0], y - 0.02), (inner[0], y - 0.02)], (60, 50, 50), 0.25, 0.02, within)
            lid = [inner, (x - side * 0.08, y - 2 * height), (x + side * 0.12, y - 1.9 * height), outer]
            self._stroke(lid, (44, 32, 30), (0.004, 0.02, 0.016))
            brow_y = y - 0.2 - look.brow_lift
            brow = [(x - side * 0.24, brow_y + 0.03), (x, brow_y - 0.07), (x + side * 0.3, brow_y + 0.03)]
            self._stroke(brow, _shade(look.hair, 0.72), (0.026, 0.034, 0.004))

    def _nose(self) -> None:
        skin = self.look.skin
        self._soft(
            _curve([(0.06, -0.05), (0.16, 0.2), (0.17, 0.34), (0.02, 0.4)]), _shade(skin, 0.74), 0.55, 0.04
        )
        self._soft(_oval((-0.03, 0.29), (0.06, 0.08)), _shade(skin, 1.4), 0.5, 0.04)
        self._stroke([(-0.13, 0.375), (0.0, 0.43), (0.13, 0.375)], _shade(skin, 0.66), (0.006, 0.014, 0.006))
        for side in (-1, 1):
            self._fill(_oval((side * 0.075, 0.378), (0.032, 0.014)), _shade(skin, 0.5))

    def _mouth(self) -> None:
        look = self.look
        red, green, blue = look.skin
        lips: Colour = (round(red * 0.78 + 14), round(green * 0.48), round(blue * 0.54))
        left, right = (-0.37, 0.62 - look.smile / 2), (0.37, 0.62 - look.smile / 2)
        middle = 0.62 + look.smile
        bow = _curve([left, (-0.16, 0.55), (-0.08, 0.52), (0.0, 0.565)]) + _curve(
            [(0.0, 0.565), (0.08, 0.52), (0.16, 0.55), right]
        )
        under = _curve([right, (0.2, middle + 2 * look.lip), (-0.2, middle + 2 * look.lip), left])
        self._soft(_oval((0, middle + 0.15), (0.24, 0.035)), _shade(look.skin, 0.7), 0.5, 0.05)
        self._fill([*bow, *under], lips)
        self._soft(_oval((-0.04, middle + 0.045), (0.13, 0.018)), _shade(lips, 1.4), 0.6, 0.03)
        self._stroke([left, (0.0, middle + 0.03), right], _shade(lips, 0.55), (0.004, 0.016, 0.004))

    def _front_hair(self) -> None:
        look = self.look
        part = look.parting
        top = _curve([(-1.06, 0.02), (-1.22, -1.42), (1.22, -1.42), (1.06, 0.02)], 48)
        right = _curve([(1.06, 0.02), (0.92, -0.2), (1.0, -0.52), (part, -0.74)])
        left = _curve([(part, -0.74), (-1.0, -0.52), (-0.92, -0.2), (-1.06, 0.02)])
        outline = [*top, *right, *left]
        self._fill(outline, look.hair)
        within = self._mask(outline)
        for offset in (-0.5, -0.1, 0.35):
            strand = _curve([(part, -0.8), (offset, -1.12), (offset * 1.9, -0.95), (offset * 2.1, -0.4)])
            back = [(x + 0.07, y + 0.03) for x, y in reversed(strand)]
            self._soft([*strand, *back], _shade(look.hair, 1.14), 0.8, 0.03, within)
        if look.long_hair:
            for side in (-1, 1):
                lock = _curve(
                    [(side * 0.95, -0.3), (side * 1.02, 0.4), (side * 0.9, 0.9), (side * 1.05, 1.6)]
                )
                rim = _curve([(side * 1.4, 1.6), (side * 1.2, 0.6), (side * 1.25, -0.2), (side * 1.0, -0.5)])
                self._fill([*lock, *rim], look.hair)
