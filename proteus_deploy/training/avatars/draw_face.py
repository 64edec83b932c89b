"""The head without its hair: ears, face, eyes, brows, nose, mouth, beard, glasses.

Two spaces are used: `head` turns with the head; in `face` the open mouth is closed as well, so that what lies
on the jaw moves with it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from proteus_deploy.training.avatars.canvas import Part, Patch, Space, shade
from proteus_deploy.training.avatars.geometry import EYE_Y, MOUTH_Y
from proteus_deploy.training.avatars.shapes import (
    Plane,
    arc,
    box,
    bump,
    capsule,
    circle,
    ellipse,
    oval,
    ramp,
    union,
)

if TYPE_CHECKING:
    from proteus_deploy.training.avatars.geometry import Geometry
    from proteus_deploy.training.avatars.identity import Colour, Identity


__all__ = ["draw_face", "draw_glasses", "outline", "skin_light"]

_LASHES = (40, 30, 32)


def outline(patch: Patch, identity: Identity) -> Plane:
    """Signed distance to the rim of the face."""
    low = ramp(patch.y, 0.0, identity.face_height)
    width = identity.face_width * (1 - identity.jaw_taper * low)
    return oval(patch.x, patch.y, width, identity.face_height, identity.squareness)


def skin_light(patch: Patch, distance: Plane) -> Plane:
    """Lit from the upper left, darker towards the rim on the far side."""
    x, y = patch.x, patch.y
    rim = ramp(distance, -0.42, 0.02)
    far = (0.5 + 0.5 * x + 0.2 * y).clip(0, 1)
    return 1.03 - 0.05 * x - 0.03 * y - 0.17 * rim * far


def draw_face(head: Space, face: Space, geometry: Geometry, identity: Identity, mouth: Plane) -> None:
    """`mouth`: how deep inside the open mouth each pixel of the canvas lies; negative outside."""
    skin = identity.skin
    _ears(head, identity)
    patch = face.patch(-1.15, -1.5, 1.15, 1.5, margin=0.15)
    distance = outline(patch, identity)
    within = patch.fill(distance, skin, light=skin_light(patch, distance), part=Part.FACE)
    x, y = patch.x, patch.y
    patch.blend(0.35 * within * bump(x, y, -0.3, -0.6, 0.65, 0.5), shade(skin, 1.2))
    for side in (-1, 1):
        patch.blend(0.45 * within * bump(x, y, side * 0.6, 0.45, 0.4, 0.32), _blush(skin))
    if identity.older:
        _wrinkles(patch, skin)
    _marks(face, identity)
    for side in (-1, 1):
        _eye(head, geometry, identity, side)
        _brow(head, identity, side)
    _nose(head, identity)
    _beard(face, identity)
    _mouth(face, geometry, identity)
    if geometry.talks:
        _open_mouth(head, geometry, identity, mouth)


def _blush(skin: Colour) -> Colour:
    red, green, blue = skin
    return min(255, red + 8), round(green * 0.85), round(blue * 0.85)


def _ears(head: Space, identity: Identity) -> None:
    for side in (-1, 1):
        cx = side * (identity.face_width + 0.02)
        patch = head.patch(cx - 0.2, -0.2, cx + 0.2, 0.6)
        ear = ellipse(patch.x, patch.y, cx, 0.12, 0.14, 0.24)
        patch.fill(ear, identity.skin, light=0.95 - 0.07 * side, part=Part.HEAD)
        patch.fill(ellipse(patch.x, patch.y, cx + side * 0.02, 0.12, 0.07, 0.14), shade(identity.skin, 0.76))
        low = 0.38
        if identity.earrings == "studs":
            patch.fill(circle(patch.x, patch.y, cx, low, 0.07), (250, 220, 120), part=Part.HEAD)
        elif identity.earrings == "hoops":
            ring = head.patch(cx - 0.25, low - 0.1, cx + 0.25, low + 0.5)
            distance = abs(circle(ring.x, ring.y, cx, low + 0.17, 0.17)) - 0.035
            ring.fill(distance, (236, 190, 70), part=Part.HEAD)


def _wrinkles(patch: Patch, skin: Colour) -> None:
    x, y = patch.x, patch.y
    lines = [arc(x, y, 0, height, 0.42, 0.06, 0.05) for height in (-0.68, -0.84)]
    for side in (-1, 1):
        lines.append(capsule(x, y, (side * 0.26, 0.5), (side * 0.45, 0.76), 0.012, 0.02))
        lines.append(arc(x, y, side * 0.43, 0.2, 0.19, -0.05, 0.035))
    patch.fill(union(*lines), shade(skin, 0.74), opacity=0.6)


def _marks(face: Space, identity: Identity) -> None:
    if identity.freckles:
        patch = face.patch(-0.75, 0.1, 0.75, 0.6)
        spots = random.Random(f"freckles {identity.seed}")
        dots = []
        for index in range(22):
            side = 1 if index % 2 else -1
            cx, cy = side * spots.uniform(0.12, 0.7), spots.uniform(0.2, 0.52)
            dots.append(circle(patch.x, patch.y, cx, cy, spots.uniform(0.018, 0.032)))
        patch.fill(union(*dots), shade(identity.skin, 0.64), opacity=0.8)
    if identity.mole:
        cx = identity.mole * 0.46
        patch = face.patch(cx - 0.1, 0.58, cx + 0.1, 0.78)
        patch.fill(circle(patch.x, patch.y, cx, 0.68, 0.042), shade(identity.skin, 0.42), opacity=0.9)


def _eye(head: Space, geometry: Geometry, identity: Identity, side: int) -> None:
    import numpy as np

    cx, cy = geometry.eye_centre(side)
    reach = 0.32 * identity.eye_size
    patch = head.patch(cx - reach, cy - 0.35, cx + reach, cy + 0.3)
    x, y = patch.x, patch.y
    patch.blend(0.4 * bump(x, y, cx, cy - 0.12, 0.36, 0.26), shade(identity.skin, 0.74))
    upper, lower = geometry.lid_rims(x, side)
    half = 0.245 * identity.eye_size
    ends = abs(x - cx) - half
    white = patch.fill(np.maximum(np.maximum(upper - y, y - lower) * 0.8, ends), (252, 252, 250))
    radius = 0.135 * identity.eye_size
    low = cy + 0.005
    patch.fill(circle(x, y, cx, low, radius), shade(identity.iris, 0.62), within=white)
    patch.fill(circle(x, y, cx, low, 0.8 * radius), identity.iris, light=1 + 1.2 * (y - low), within=white)
    patch.fill(circle(x, y, cx, low, 0.44 * radius), (20, 16, 18), within=white)
    patch.blend(0.3 * white * ramp(y - upper, 0.09, 0.0), (70, 60, 66))
    patch.fill(circle(x, y, cx - 0.055, low - 0.055, 0.042), (255, 255, 255), within=white)
    edge = geometry.lid_edge(x, side, geometry.lid)
    if geometry.lid.any():
        folded = np.maximum(np.maximum(upper - 0.06 - y, y - edge) * 0.8, ends)
        patch.fill(folded, shade(identity.skin, 0.9), part=Part.LID)
    bold = 0.085 if identity.kind == "woman" else 0.06
    part = ((x - cx) / half).clip(-1.2, 1.2)
    thick = bold * (1.05 - 0.45 * part * part) * (1 + 0.3 * side * part)
    lash = np.maximum(abs(y - edge) * 0.85 - 0.5 * thick, ends - 0.03)
    patch.fill(lash, _LASHES, part=Part.LID if geometry.lid.any() else None)
    patch.fill(np.maximum(abs(y - lower) * 0.85 - 0.012, ends), shade(identity.skin, 0.5), opacity=0.5)


def _brow(head: Space, identity: Identity, side: int) -> None:
    cx, cy = side * (identity.eye_spacing + 0.02), EYE_Y - identity.brow_height
    thick = {"thin": 0.075, "medium": 0.12, "bushy": 0.155}[identity.brows]
    patch = head.patch(cx - 0.32, cy - 0.3, cx + 0.32, cy + 0.2)
    stroke = arc(patch.x, patch.y, cx, cy + 0.02, 0.29, identity.brow_arch, thick, tilt=side * 0.02)
    patch.fill(stroke, _brow_colour(identity))


def _brow_colour(identity: Identity) -> Colour:
    if identity.hair_colour in ("pink", "blue", "blond", "white"):
        return shade(identity.hair, 0.66) if identity.hair_colour in ("blond", "white") else (70, 48, 44)
    return shade(identity.hair, 0.78)


def _nose(head: Space, identity: Identity) -> None:
    skin, wide, low = identity.skin, identity.nose_width, identity.nose_length
    patch = head.patch(-0.35, -0.1, 0.4, 0.65)
    x, y = patch.x, patch.y
    patch.blend(0.5 * bump(x, y, 0.55 * wide + 0.03, low - 0.16, 0.12, 0.34), shade(skin, 0.74))
    patch.blend(0.5 * bump(x, y, -0.04, low - 0.1, 0.1, 0.2), shade(skin, 1.3))
    patch.fill(arc(x, y, 0, low, wide, -0.075, 0.055), shade(skin, 0.6))
    for side in (-1, 1):
        nostril = ellipse(x, y, side * 0.52 * wide, low + 0.015, 0.045, 0.026)
        patch.fill(nostril, shade(skin, 0.46), opacity=0.85)


def _mouth(face: Space, geometry: Geometry, identity: Identity) -> None:
    import numpy as np

    half, full = identity.mouth_width, identity.lip_fullness
    patch = face.patch(-half, MOUTH_Y - 0.25, half, MOUTH_Y + 0.35, margin=0.15)
    x, y = patch.x, patch.y
    line = geometry.lip_line(x)
    part = x / half
    arch = (1 - part * part).clip(0, 1)
    ends = abs(x) - half
    bow = (
        0.09 * arch + 0.03 * bump(x, x * 0, 0.13, 0, 0.14, 1) + 0.03 * bump(x, x * 0, -0.13, 0, 0.14, 1)
    ) * full
    upper = np.maximum(np.maximum(line - bow - y, y - line), ends)
    lower = np.maximum(np.maximum(line - y, y - line - 0.135 * full * arch), ends)
    patch.blend(0.45 * bump(x, y, 0, MOUTH_Y + 0.27, 0.3, 0.13), shade(identity.skin, 0.76))
    lips = _lips(identity)
    patch.fill(upper, shade(lips, 0.86))
    under = patch.fill(lower, lips)
    patch.blend(0.5 * under * bump(x, y, -0.06, MOUTH_Y + 0.07 * full + 0.04, 0.17, 0.06), shade(lips, 1.5))
    stroke = np.maximum(abs(y - line) - 0.018 - 0.014 * arch, ends - 0.02)
    patch.fill(stroke, shade(lips, 0.45))


def _lips(identity: Identity) -> Colour:
    red, green, blue = identity.skin
    tint = identity.lip_tint
    natural = (red * 0.88, green * 0.76, blue * 0.76)
    painted = (198.0, 52.0, 66.0)
    first, second, third = (round(a + (b - a) * 0.75 * tint) for a, b in zip(natural, painted, strict=True))
    return first, second, third


def _open_mouth(head: Space, geometry: Geometry, identity: Identity, mouth: Plane) -> None:
    half = identity.mouth_width
    patch = head.patch(-half, MOUTH_Y - 0.15, half, MOUTH_Y + 0.4, margin=0.05)
    x, y = patch.x, patch.y
    depth = patch.view(mouth)
    inside = patch.fill(-depth, (92, 26, 34), part=Part.MOUTH)
    below = y - geometry.lip_line(x)
    patch.fill(below - 0.085, (250, 248, 244), within=inside * patch.cover(abs(x) - 0.75 * half))
    patch.fill(ellipse(x, y, 0, MOUTH_Y + 0.3, 0.2, 0.12), (206, 92, 96), within=inside)


def _beard(face: Space, identity: Identity) -> None:
    import numpy as np

    style = identity.facial_hair
    if style == "none":
        return
    colour = _beard_colour(identity)
    patch = face.patch(-1.15, -0.1, 1.15, 1.6, margin=0.15)
    x, y = patch.x, patch.y
    rim = outline(patch, identity)
    light = 1.05 - 0.1 * x
    if style in ("beard", "stubble"):
        # From the ears along the cheeks to below the nose; the lips are drawn over it. Skin shows through,
        # as the tiny detector knows faces by it: only along the jaw is the beard dense.
        cheek = 0.64 - 0.6 * ramp(abs(x), 0.5, 0.98) + 0.2 * bump(x, x * 0, 0.0, 0.0, 0.5, 1.0)
        thin = max(0.6 if style == "beard" else 0.76, min(1.0, 118 / identity.skin[0]))
        patch.fill(np.maximum(rim, cheek - y), shade(identity.skin, thin), light=light, part=Part.FACE)
        if style == "beard":
            dense = np.maximum(
                np.maximum(rim - 0.09, cheek - 0.04 - y), -0.06 - 0.12 * ramp(y, 0.8, 1.15) - rim
            )
            patch.fill(dense, colour, light=light, part=Part.FACE)
    elif style == "goatee":
        patch.fill(ellipse(x, y, 0, 1.23, 0.24, 0.21), colour, light=light, part=Part.FACE)
    elif style == "moustache":
        patch.fill(arc(x, y, 0, 0.75, 0.36, 0.07, 0.16), colour)


def _beard_colour(identity: Identity) -> Colour:
    """As the hair, brown under dyed hair; blond is darkened on light skin, where it would not be seen."""
    if identity.hair_colour in ("pink", "blue"):
        return 74, 50, 40
    light_on_light = identity.hair_colour == "blond" and identity.skin[0] > 170
    return shade(identity.hair, 0.66 if light_on_light else 0.95)


def draw_glasses(head: Space, identity: Identity) -> None:
    if identity.glasses == "none":
        return
    import numpy as np

    patch = head.patch(-1.1, -0.5, 1.1, 0.5, margin=0.1)
    x, y = patch.x, patch.y
    rims: list[Plane] = []
    cx = identity.eye_spacing + 0.01
    for side in (-1, 1):
        if identity.glasses == "round":
            lens = circle(x, y, side * cx, EYE_Y + 0.02, 0.335)
        elif identity.glasses == "square":
            lens = box(x, y, side * (cx - 0.045), EYE_Y + 0.03, 0.31, 0.23, 0.1)
        else:
            lifted = y + 0.28 * (side * x - cx).clip(0, 1)
            lens = oval(x - side * cx, lifted - EYE_Y, 0.36, 0.255, 0.45)
        rims.append(lens)
        glass = patch.fill(lens, (236, 244, 250), opacity=0.14)
        streak = abs(x - side * cx + 0.5 * y + 0.12) - 0.035
        patch.fill(streak, (255, 255, 255), within=glass, opacity=0.28)
    frame = abs(union(*rims)) - 0.028
    bridge = arc(x, y, 0, EYE_Y - 0.02, cx - 0.28, 0.06, 0.08)
    arms = np.maximum(abs(y - EYE_Y + 0.06) - 0.025, np.maximum(cx + 0.3 - abs(x), abs(x) - 1.0))
    patch.fill(union(frame, bridge, arms), identity.frame)
