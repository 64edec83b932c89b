"""Hair and hats: what lies behind the head, what lies before it, and braids that hang over the clothes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_deploy.training.avatars.canvas import Part, Patch, Space, shade
from proteus_deploy.training.avatars.identity import FRINGED, HAT_COLOURS
from proteus_deploy.training.avatars.shapes import (
    Plane,
    box,
    bump,
    capsule,
    circle,
    ellipse,
    oval,
    ramp,
    union,
    wave,
)

if TYPE_CHECKING:
    from proteus_deploy.training.avatars.identity import Identity


__all__ = ["draw_back_hair", "draw_front_hair", "draw_hat"]

_LONG = ("long", "wavy", "bob")
_PULLED_BACK = ("bun", "ponytail", "braids")
# (cosine, sine) of points on the upper part of a circle, every 20 degrees from 200 to -20: where curls sit.
_RING = tuple(
    (c, s)
    for c, s in (
        (-0.94, 0.34), (-1.0, 0.0), (-0.94, -0.34), (-0.77, -0.64), (-0.5, -0.87), (-0.17, -0.98),
        (0.17, -0.98), (0.5, -0.87), (0.77, -0.64), (0.94, -0.34), (1.0, 0.0), (0.94, 0.34),
    )
)  # fmt: skip


def _gloss(patch: Patch, strands: float) -> Plane:
    """Light on hair: from the upper left, a shining band over the crown, and strands."""
    x, y = patch.x, patch.y
    radius = x * x + y * y * 0.56
    band = ramp(radius, 0.62, 0.85) * ramp(radius, 1.15, 0.9) * ramp(y, -0.3, -0.8)
    fibres = wave(strands * x / (2.6 + 0.5 * y) + 0.04 * y)
    return 1.0 - 0.13 * x - 0.05 * y + band * (0.2 - 0.16 * x) + 0.05 * fibres


def draw_back_hair(head: Space, identity: Identity) -> None:
    import numpy as np

    style, volume = identity.hair_style, identity.hair_volume
    dark = shade(identity.hair, 0.74)
    if style not in ("bald", "cropped", "mohawk", *_LONG):
        patch = head.patch(-1.4, -1.75, 1.4, 0.5)
        behind = np.maximum(_skull(patch, identity), patch.y - 0.32)
        patch.fill(behind, dark, part=Part.HEAD)
    if style in _LONG:
        patch = head.patch(-1.6, -1.75, 1.6, 2.4)
        patch.fill(_curtain(patch, identity), dark, light=_gloss(patch, 11), part=Part.HEAD)
    elif style in ("curly", "afro"):
        patch = head.patch(-1.9, -2.1, 1.9, 1.6)
        patch.fill(_curls(patch, identity), dark, light=_curl_light(patch), part=Part.HEAD)
    elif style == "bun":
        patch = head.patch(-0.6, -2.1, 0.6, -1.0)
        knot = circle(patch.x, patch.y, 0, -1.55, 0.4 * volume)
        light = 1.05 - 0.3 * patch.x - 0.25 * (patch.y + 1.6) + 0.06 * wave(2.2 * patch.y + 1.3 * patch.x)
        patch.fill(knot, identity.hair, light=light, part=Part.HEAD)
    elif style == "ponytail":
        side = identity.parting
        patch = head.patch(-1.9, -1.2, 1.9, 1.9)
        x, y = patch.x, patch.y
        tail = union(
            capsule(x, y, (side * 0.75, -0.95), (side * 1.3, -0.75), 0.2, 0.3 * volume),
            capsule(x, y, (side * 1.3, -0.75), (side * 1.5, -0.05), 0.3 * volume, 0.36 * volume),
            capsule(x, y, (side * 1.5, -0.05), (side * 1.42, 0.75), 0.36 * volume, 0.27),
            capsule(x, y, (side * 1.42, 0.75), (side * 1.6, 1.4), 0.27, 0.07),
        )
        light = 1.0 - 0.1 * x + 0.1 * wave(1.9 * x)
        patch.fill(tail, shade(identity.hair, 0.88), light=light, part=Part.HEAD)
        patch.fill(circle(x, y, side * 0.95, -0.88, 0.17), (214, 70, 92), part=Part.HEAD)


def _curtain(patch: Patch, identity: Identity) -> Plane:
    """Long hair as a whole: a cap that falls on both sides."""
    x, y, volume = patch.x, patch.y, identity.hair_volume
    low = {"long": 2.15, "wavy": 2.05, "bob": 1.12}[identity.hair_style]
    if identity.hair_style == "wavy":
        x = x + 0.085 * wave(1.05 * y) * ramp(y, -0.6, 0.2)
    half = 1.14 + 0.08 * volume
    flare = 1 + (0.1 * ramp(y, 0.0, 2.0) if identity.hair_style != "bob" else 0.06 * ramp(y, -0.2, 0.8))
    fall = box(x / flare, y, 0, (low - 0.35) / 2, half, (low + 0.35) / 2, 0.42)
    return union(fall, ellipse(x, y, 0, -0.1, half, 1.28 + 0.2 * volume))


def _curls(patch: Patch, identity: Identity) -> Plane:
    x, y = patch.x, patch.y
    if identity.hair_style == "afro":
        reach, rise, curl = 1.28 * identity.hair_volume, 1.38 * identity.hair_volume, 0.34
        cy = -0.5
    else:
        reach, rise, curl, cy = 1.1, 1.28, 0.26 * identity.hair_volume, -0.2
    knots = [circle(x, y, reach * c, cy + rise * s, curl) for c, s in _RING]
    if identity.hair_style == "curly":
        low = 1.1 if identity.kind == "woman" else 0.3
        steps = (0.3, 0.62, 0.94) if low > 1 else (0.3,)
        knots += [circle(x, y, s * (reach + 0.05), dy, curl) for dy in steps for s in (-1, 1)]
        if low > 1:
            knots.append(box(x, y, 0, 0.4, 1.15, 0.75, 0.3))
    return union(ellipse(x, y, 0, cy, reach, rise), *knots)


def _curl_light(patch: Patch) -> Plane:
    x, y = patch.x, patch.y
    rings = wave(1.75 * x + 0.35 * wave(1.3 * y)) * wave(1.75 * y + 0.35 * wave(1.3 * x))
    return 1.03 - 0.13 * x - 0.1 * y + 0.17 * rings


def draw_front_hair(head: Space, identity: Identity) -> None:
    style = identity.hair_style
    if style == "bald":
        patch = head.patch(-0.7, -1.4, 0.5, -0.7)
        patch.blend(0.5 * bump(patch.x, patch.y, -0.25, -1.0, 0.5, 0.22), shade(identity.skin, 1.6))
        return
    import numpy as np

    patch = head.patch(-1.9, -2.15, 1.9, 0.6)
    x, y = patch.x, patch.y
    if style in ("curly", "afro"):
        cap, light = _curls(patch, identity), _curl_light(patch)
        scallop = 0.07 * wave(1.5 * x + 0.2)
    else:
        cap, light, scallop = _cap(patch, identity), _gloss(patch, 13), 0.0
    line = _hairline(x, identity) + scallop
    # The line is steep at the temples, where a distance along y would blur it.
    step = np.gradient(line, axis=2) * patch.scale
    below = (y - line) / np.sqrt(1 + step * step)
    shadow = 0.34 * ramp(y, -1.0, -0.4) * ramp(y - line, 0.22, 0.0) * (y > line)
    patch.multiply(1 - shadow * patch.cover(abs(x) - 0.9) * (patch.parts == Part.FACE))
    patch.fill(np.maximum(cap, below), identity.hair, light=light, part=Part.HEAD)
    if style in _LONG:
        _locks(head, identity)
    elif style == "side-parted":
        part = -0.5 * identity.parting
        groove = capsule(x, y, (part, -1.02), (part * 0.8, -1.42), 0.015, 0.02)
        patch.fill(groove, shade(identity.hair, 0.6), opacity=0.8)
    elif style == "braids":
        _braids(head, identity)


def _cap(patch: Patch, identity: Identity) -> Plane:
    """The outside of hair that lies on the skull."""
    x, y, volume = patch.x, patch.y, identity.hair_volume
    style, height = identity.hair_style, identity.face_height
    if style in _LONG:
        return _curtain(patch, identity)
    cap = _skull(patch, identity)
    if style == "short":
        return union(cap, ellipse(x, y, -0.15 * identity.parting, -height + 0.04, 0.7, 0.26 * volume))
    if style == "side-parted":
        return union(cap, ellipse(x, y, 0.22 * identity.parting, -height + 0.16, 0.84, 0.34 * volume))
    if style == "mohawk":
        spikes = [capsule(x, y, (dx, -1.0), (dx * 1.5, -1.62 - 0.25 * volume + abs(dx)), 0.2, 0.05) for dx in
                  (-0.24, -0.08, 0.08, 0.24)]  # fmt: skip
        return union(cap, *spikes)
    return cap


def _skull(patch: Patch, identity: Identity) -> Plane:
    """The head with a layer of hair on it."""
    layers = {"cropped": 0.06, "short": 0.15, "side-parted": 0.13, "pixie": 0.17, "mohawk": 0.04}
    thick = layers.get(identity.hair_style, 0.1) * identity.hair_volume
    return oval(
        patch.x, patch.y, identity.face_width + 0.03 + 0.6 * thick, identity.face_height + thick, 0.12
    )


def _hairline(x: Plane, identity: Identity) -> Plane:
    """y above which hair covers the face."""
    side = abs(x)
    square = x * x
    temple = 1.0 * ramp(side, 0.82, 1.02)
    style = identity.hair_style
    if identity.fringe and style in FRINGED:
        teeth = 0.03 * wave(2.6 * x)
        return -0.51 + 0.08 * square + teeth + 0.6 * temple
    swept = (x * identity.parting).clip(-1.5, 1.5)
    lift = swept + 0.48
    lines = {
        "side-parted": -0.98 + 0.26 * lift * lift + 0.3 * ramp(-swept, 0.55, 0.9) + 0.8 * temple,
        "pixie": -0.94 + 0.32 * lift * lift + 0.4 * ramp(-swept, 0.5, 0.9) + 0.7 * temple,
        "short": -0.84 + 0.1 * square + 0.05 * wave(1.2 * x + 0.3) + 0.85 * temple,
        "mohawk": -0.9 + 0.1 * square + 0.7 * temple,
        **dict.fromkeys(_LONG, -1.08 + 0.3 * side + 0.35 * square + 0.9 * temple),
        **dict.fromkeys(_PULLED_BACK, -0.92 + 0.22 * square + 0.8 * temple),
    }
    return lines.get(style, -0.86 + 0.12 * square + 0.8 * temple)


def _locks(head: Space, identity: Identity) -> None:
    """The strands of long hair that hang in front of the ears and shoulders."""
    import numpy as np

    patch = head.patch(-1.6, -0.9, 1.6, 2.4)
    x, y = patch.x, patch.y
    inner = identity.face_width * (0.93 - 0.07 * ramp(y, -0.4, 0.9)) + 0.12 * ramp(y, 1.0, 2.1)
    if identity.hair_style == "wavy":
        inner = inner + 0.06 * wave(0.9 * y + 0.2)
    lock = np.maximum(_curtain(patch, identity), np.maximum(inner - abs(x), -0.75 - y))
    patch.fill(lock, identity.hair, light=_gloss(patch, 13), part=Part.HEAD)


def _braids(head: Space, identity: Identity) -> None:
    patch = head.patch(-1.6, 0.1, 1.6, 2.5)
    x, y = patch.x, patch.y
    for side in (-1, 1):
        for index in range(6):
            cx, cy = side * (1.06 + 0.035 * index), 0.42 + 0.32 * index
            knot = ellipse(x, y, cx, cy, 0.24 - 0.018 * index, 0.21)
            light = 1.1 - 0.5 * (y - cy) - 0.35 * (x - cx)
            patch.fill(knot, identity.hair, light=light, part=Part.HEAD)
        patch.fill(box(x, y, side * 1.26, 2.2, 0.13, 0.06, 0.03), (214, 70, 92), part=Part.HEAD)


def draw_hat(head: Space, identity: Identity) -> None:
    if identity.hat == "none":
        return
    import numpy as np

    colour = HAT_COLOURS[identity.hat_colour]
    patch = head.patch(-1.5, -2.1, 1.5, -0.2)
    x, y = patch.x, patch.y
    light = 1.06 - 0.14 * x - 0.12 * (y + 1)
    wide = identity.face_width + (0.32 if identity.hair_style in (*_LONG, "curly") else 0.2)
    dome = oval(x, y + 0.35, wide, 1.36, 0.25)
    if identity.hat == "beanie":
        ribs = light + 0.08 * wave(3.2 * x)
        patch.fill(np.maximum(dome, y + 0.78), colour, light=ribs, part=Part.HEAD)
        brim = box(x, y + 0.1 * x * x, 0, -0.84, wide + 0.03, 0.17, 0.14)
        patch.fill(brim, shade(colour, 0.82), light=light + 0.1 * wave(4.2 * x), part=Part.HEAD)
        patch.fill(circle(x, y, 0, -1.8, 0.2), shade(colour, 1.3), light=light, part=Part.HEAD)
    elif identity.hat == "cap":
        patch.fill(np.maximum(dome, y + 0.75), colour, light=light, part=Part.HEAD)
        patch.fill(
            abs(x) - 0.012, shade(colour, 0.75), within=patch.cover(np.maximum(dome, y + 0.8)), opacity=0.7
        )
        peak = np.maximum(ellipse(x, y, 0, -0.62, wide + 0.02, 0.32), y + 0.6 - 0.16 * (1 - x * x))
        patch.fill(peak, shade(colour, 0.72), light=light, part=Part.HEAD)
        patch.fill(circle(x, y, 0, -1.24, 0.17), (250, 248, 240), part=Part.HEAD)
    else:
        band = abs(y + 0.9 - 0.14 * x * x) - 0.13
        patch.fill(np.maximum(band, dome), colour, light=light, part=Part.HEAD)
