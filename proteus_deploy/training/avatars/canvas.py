"""Painting on all frames of a clip at once, in the coordinates of a part and only where that part can be."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_deploy.training.avatars.geometry import Placement
    from proteus_deploy.training.avatars.shapes import Plane


__all__ = ["Canvas", "Part", "Patch", "Space", "shade"]

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


class Part(IntEnum):
    """What a pixel shows, as far as it moves in a way of its own."""

    WALL = 0
    BODY = 1
    HEAD = 2  # hair, ears, hat
    FACE = 3
    MOUTH = 4  # inside the open mouth: it stays when the jaw drops
    LID = 5
    ARM = 6


class Canvas:
    """planes: float32 [3, F, H, W], 0..255. parts: uint8 [F, H, W], a `Part` each."""

    def __init__(self, frames: int, size: int) -> None:
        import numpy as np

        self.size = size
        self.planes = np.zeros((3, frames, size, size), dtype=np.float32)
        self.parts = np.zeros((frames, size, size), dtype=np.uint8)

    def frames(self) -> NDArray[np.uint8]:
        """uint8 [F, H, W, 3]."""
        import numpy as np

        rounded = (self.planes + 0.5).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(rounded.transpose(1, 2, 3, 0))


class Space:
    """The coordinates of one part at the pixels of a canvas: x, y float32 [F, H, W]."""

    def __init__(self, canvas: Canvas, placement: Placement) -> None:
        import numpy as np

        self.canvas, self.placement = canvas, placement
        # Pixel (0, 0) has its middle at (0.5, 0.5).
        steps = np.arange(canvas.size, dtype=np.float32) + 0.5
        self.x, self.y = placement.inverse(steps[None, None, :], steps[None, :, None])

    def patch(self, x0: float, y0: float, x1: float, y1: float, margin: float = 0.1) -> Patch:
        """The pixels that the box may cover on any frame, `margin` around it included."""
        columns, rows = self.reach(x0 - margin, y0 - margin, x1 + margin, y1 + margin)
        return Patch(self, rows, columns)

    def everywhere(self) -> Patch:
        return Patch(self, slice(0, self.canvas.size), slice(0, self.canvas.size))

    def reach(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        import numpy as np

        frames = len(self.placement.scale)
        corners = [(x, y) for x in (x0, x1) for y in (y0, y1)]
        every = np.repeat(np.arange(frames)[:, None], 4, axis=1)
        px, py = self.placement.forward(
            np.array([[x for x, _ in corners]], dtype=np.float32).repeat(frames, 0),
            np.array([[y for _, y in corners]], dtype=np.float32).repeat(frames, 0),
            every,
        )
        return self._pixels(px), self._pixels(py)

    def _pixels(self, places: Plane) -> slice:
        size = self.canvas.size
        low, high = int(places.min()) - 1, int(places.max()) + 2
        return slice(min(max(low, 0), size), min(max(high, 0), size))


class Patch:
    """A rectangle of pixels on all frames, with the coordinates of its space."""

    def __init__(self, space: Space, rows: slice, columns: slice) -> None:
        self._where = (slice(None), rows, columns)
        self._canvas = space.canvas
        self.x, self.y = space.x[self._where], space.y[self._where]
        self.scale = space.placement.scale
        self.parts = space.canvas.parts[self._where]

    def view(self, plane: Plane) -> Plane:
        """This patch of a plane [F, H, W] of the whole canvas."""
        return plane[self._where]

    def cover(self, distance: Plane) -> Plane:
        """How much of each pixel lies inside a signed distance: the antialiased edge."""
        return (0.5 - distance * self.scale).clip(0, 1)

    def fill(
        self,
        distance: Plane,
        colour: Colour,
        *,
        light: Plane | float = 1.0,
        part: Part | None = None,
        opacity: float = 1.0,
        within: Plane | None = None,
    ) -> Plane:
        """Paint the inside of a signed distance and return its coverage, for `within` of what lies on it.

        light: factor on the colour. part: whose pixels these become, where more than half covered.
        """
        coverage = self.cover(distance)
        if within is not None:
            coverage = coverage * within
        self.blend(coverage if opacity == 1.0 else coverage * opacity, colour, light=light)
        if part is not None:
            self.parts[coverage >= 0.5] = part
        return coverage

    def blend(self, alpha: Plane, colour: Colour, *, light: Plane | float = 1.0) -> None:
        """Mix the colour in by alpha [F, h, w], 0..1."""
        for plane, value in zip(self._canvas.planes, colour, strict=True):
            view = plane[self._where]
            view += alpha * (light * float(value) - view)

    def multiply(self, factor: Plane) -> None:
        """Darken (factor < 1) or lighten what is there."""
        for plane in self._canvas.planes:
            view = plane[self._where]
            view *= factor


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (factor < 1) or nearer to white (factor > 1, by the part above 1)."""
    if factor <= 1:
        red, green, blue = (round(value * factor) for value in colour)
    else:
        red, green, blue = (round(value + (255 - value) * (factor - 1)) for value in colour)
    return red, green, blue
