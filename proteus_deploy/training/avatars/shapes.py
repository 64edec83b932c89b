"""Signed distances to simple shapes: arrays of coordinates in, arrays of distances out, negative inside.

Only + - * / and square roots are used on arrays: those are exact on every CPU, where sines and powers differ
in the last bit, so that a seed gives the same bytes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# float32 [F, h, w], one value per pixel. NumPy's own types widen in every product with a Python float.
Plane = Any

__all__ = [
    "Plane",
    "arc",
    "box",
    "bump",
    "capsule",
    "circle",
    "ellipse",
    "oval",
    "polygon",
    "ramp",
    "union",
    "wave",
]


def circle(x: Plane, y: Plane, cx: float, cy: float, radius: float) -> Plane:
    import numpy as np

    dx, dy = x - cx, y - cy
    return np.sqrt(dx * dx + dy * dy) - radius


def ellipse(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float) -> Plane:
    """First-order distance: exact on the rim, where it decides about coverage."""
    import numpy as np

    dx, dy = (x - cx) / rx, (y - cy) / ry
    radius = np.sqrt(dx * dx + dy * dy)
    gx, gy = dx / rx, dy / ry
    return radius * (radius - 1) / (np.sqrt(gx * gx + gy * gy) + 1e-6)


def oval(x: Plane, y: Plane, rx: Plane | float, ry: float, squareness: float) -> Plane:
    """Between an ellipse (squareness 0) and a rounded square (1) about (0, 0); along the radius."""
    import numpy as np

    dx, dy = x / rx, y / ry
    dx, dy = dx * dx, dy * dy
    rho = np.sqrt(dx + dy)
    if squareness:
        rho = rho * (1 - squareness) + np.sqrt(np.sqrt(dx * dx + dy * dy)) * squareness
    return np.sqrt(x * x + y * y) * (1 - 1 / (rho + 1e-6))


def box(x: Plane, y: Plane, cx: float, cy: float, half_x: float, half_y: float, corner: float) -> Plane:
    """A rectangle with rounded corners."""
    import numpy as np

    dx = np.abs(x - cx) - (half_x - corner)
    dy = np.abs(y - cy) - (half_y - corner)
    ox, oy = np.maximum(dx, 0), np.maximum(dy, 0)
    return np.sqrt(ox * ox + oy * oy) + np.minimum(np.maximum(dx, dy), 0) - corner


def capsule(
    x: Plane, y: Plane, start: tuple[float, float], end: tuple[float, float], r0: float, r1: float
) -> Plane:
    """A thick line whose radius runs from r0 to r1."""
    import numpy as np

    ex, ey = end[0] - start[0], end[1] - start[1]
    dx, dy = x - start[0], y - start[1]
    along = ((dx * ex + dy * ey) / (ex * ex + ey * ey)).clip(0, 1)
    ox, oy = dx - along * ex, dy - along * ey
    return np.sqrt(ox * ox + oy * oy) - (r0 + (r1 - r0) * along)


def arc(
    x: Plane, y: Plane, cx: float, cy: float, half: float, lift: float, thick: float, tilt: float = 0.0
) -> Plane:
    """A stroke along a parabola: `half` wide either way, its middle `lift` above its ends (y points down).

    It is `thick` wide in the middle and tapers to points. tilt: how much further down the right end lies.
    """
    import numpy as np

    u = (x - cx) / half
    inside = np.maximum(1 - u * u, 0)
    slope = (2 * lift * u + tilt) / half
    away = np.abs(y - cy + lift * inside - tilt * u) / np.sqrt(1 + slope * slope)
    return np.maximum(away - 0.5 * thick * (0.35 + 0.65 * inside), (np.abs(u) - 1) * half)


def polygon(x: Plane, y: Plane, corners: Sequence[tuple[float, float]]) -> Plane:
    """A convex polygon, its corners clockwise as seen (y points down)."""
    import numpy as np

    inside = None
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = x1 - x0, y1 - y0
        edge = ((x - x0) * ey - (y - y0) * ex) * (1 / math.sqrt(ex * ex + ey * ey))
        inside = edge if inside is None else np.maximum(inside, edge)
    assert inside is not None
    return inside


def union(*distances: Plane) -> Plane:
    import numpy as np

    least = distances[0]
    for distance in distances[1:]:
        least = np.minimum(least, distance)
    return least


def ramp(value: Plane, low: float, high: float) -> Plane:
    """0 at `low`, 1 at `high`, smooth between."""
    t = ((value - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def bump(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float) -> Plane:
    """A soft hill, 1 in the middle and 0 from the ellipse's rim on."""
    import numpy as np

    dx, dy = (x - cx) / rx, (y - cy) / ry
    height = np.maximum(1 - dx * dx - dy * dy, 0)
    return height * height


def wave(value: Plane) -> Plane:
    """Like a sine of period 1, from -1 to 1, made of parabolas."""
    import numpy as np

    part = value - np.floor(value)
    half = part - 0.5
    return 16 * half * (np.abs(half) - 0.5)
