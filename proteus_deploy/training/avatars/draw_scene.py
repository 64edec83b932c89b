"""The wall behind a person, the neck and the clothes, and the waving arm."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from proteus_deploy.training.avatars.canvas import Part, Patch, Space, shade
from proteus_deploy.training.avatars.shapes import (
    Plane,
    box,
    bump,
    capsule,
    circle,
    ellipse,
    oval,
    polygon,
    ramp,
    union,
    wave,
)

if TYPE_CHECKING:
    from proteus_deploy.training.avatars.clothing_and_scene import Scene
    from proteus_deploy.training.avatars.geometry import Geometry
    from proteus_deploy.training.avatars.identity import Identity


__all__ = ["draw_arm", "draw_body", "draw_wall"]

_ARTS = ((232, 120, 74), (74, 128, 168), (96, 150, 96), (150, 110, 176))
_LEAF = (64, 140, 84)


def draw_wall(wall: Space, body: Space, scene: Scene) -> None:
    """Cover every pixel, and put the person's soft shadow on the wall."""
    patch = wall.everywhere()
    x, y = patch.x, patch.y
    # The lamp stands at the upper left, here and on the person.
    light = 1.07 - 0.14 * x - 0.16 * y - 0.25 * (x * x + y * y)
    if scene.place == "wallpaper":
        light = light * (1 + 0.09 * (2.5 * wave(7.3 * x + scene.layout)).clip(-1, 1))
    elif scene.place == "curtain":
        light = light * (1 + 0.1 * wave(5.2 * x + scene.layout) + 0.05 * wave(11.3 * x + 0.3))
    elif scene.place == "studio":
        light = light + 0.16 * bump(x, y, -0.05, -0.08, 0.75, 0.75) - 0.06
    patch.blend(patch.x * 0 + 1, scene.background, light=light)
    if scene.place == "room":
        _furnish(wall, scene)
    elif scene.place == "studio":
        _lights(wall, scene)
    shadow = body.patch(-2.2, -2.0, 3.0, 3.4)
    alpha = bump(shadow.x, shadow.y, 0.32, 0.35, 2.0, 2.6)
    shadow.multiply(1 - 0.26 * alpha)


def _furnish(wall: Space, scene: Scene) -> None:
    side = 1 if scene.layout < 0.5 else -1
    dado = wall.patch(-0.8, 0.2, 0.8, 0.8)
    dado.multiply(1 - 0.2 * dado.cover(0.235 - dado.y))
    dado.fill(abs(dado.y - 0.235) - 0.012, shade(scene.background, 1.55), opacity=0.85)
    if scene.layout % 0.5 < 0.25:
        _picture(wall, 0.36 * side, round(scene.layout * 40))
    else:
        _window(wall, 0.35 * side)
    _plant(wall, -0.42 * side)


def _picture(wall: Space, cx: float, choice: int) -> None:
    patch = wall.patch(cx - 0.1, -0.4, cx + 0.1, -0.12)
    x, y = patch.x, patch.y
    patch.multiply(1 - 0.25 * bump(x, y, cx + 0.015, -0.24, 0.17, 0.21))
    patch.fill(box(x, y, cx, -0.26, 0.095, 0.125, 0.008), (250, 248, 244))
    art = patch.fill(box(x, y, cx, -0.26, 0.07, 0.1, 0.004), (226, 232, 236))
    patch.fill(circle(x, y, cx + 0.02, -0.29, 0.028), _ARTS[choice % 4], within=art)
    patch.fill(circle(x, y, cx - 0.03, -0.13, 0.09), _ARTS[(choice + 1) % 4], within=art)


def _window(wall: Space, cx: float) -> None:
    patch = wall.patch(cx - 0.12, -0.42, cx + 0.12, -0.04)
    x, y = patch.x, patch.y
    patch.fill(box(x, y, cx, -0.23, 0.12, 0.17, 0.01), (250, 250, 250))
    pane = patch.fill(box(x, y, cx, -0.23, 0.1, 0.15, 0.006), (196, 226, 246), light=1.02 - 0.3 * (y + 0.2))
    patch.blend(pane * bump(x, y, cx - 0.02, -0.2, 0.09, 0.03), (255, 255, 255))
    patch.fill(abs(x - cx) - 0.007, (250, 250, 250), within=pane)
    patch.fill(abs(y + 0.23) - 0.007, (250, 250, 250), within=pane)


def _plant(wall: Space, cx: float) -> None:
    patch = wall.patch(cx - 0.16, -0.06, cx + 0.16, 0.42)
    for index, (dx, top) in enumerate(
        ((-0.11, 0.04), (0.11, 0.06), (-0.06, -0.03), (0.06, -0.02), (0.0, -0.06))
    ):
        leaf = capsule(patch.x, patch.y, (cx, 0.3), (cx + dx, top), 0.012, 0.026)
        patch.fill(leaf, shade(_LEAF, 0.8 + 0.07 * index))
    patch.fill(
        box(patch.x, patch.y, cx, 0.4, 0.075, 0.1, 0.02), (244, 240, 234), light=1 - 2 * (patch.x - cx)
    )


def _lights(wall: Space, scene: Scene) -> None:
    places = random.Random(f"bokeh {scene.layout}")
    for _ in range(9):
        cx, cy = places.uniform(-0.5, 0.5), places.uniform(-0.5, 0.3)
        radius = places.uniform(0.03, 0.075)
        patch = wall.patch(cx - radius, cy - radius, cx + radius, cy + radius, 0.02)
        # Brighter, not whiter: red mixed with white has the colour of skin.
        patch.multiply(1 + 0.14 * patch.cover(circle(patch.x, patch.y, cx, cy, radius)))


def draw_body(body: Space, geometry: Geometry, identity: Identity, scene: Scene) -> None:
    """Neck, shoulders and clothes; the upper arm too when the person waves (`draw_arm` adds the rest)."""
    import numpy as np

    clothes, half = scene.clothes, identity.shoulders
    if scene.garment == "hoodie":
        hood = body.patch(-1.3, 0.4, 1.3, 2.4)
        hood.fill(ellipse(hood.x, hood.y, 0, 1.45, 1.12, 0.72), shade(clothes, 0.72), part=Part.BODY)
    neck = body.patch(-0.7, 0.4, 0.7, 2.6)
    wide = 0.44 if identity.kind == "woman" else 0.54
    flare = 0.28 * ramp(neck.y, 1.25, 1.85)
    skin = neck.fill(
        (abs(neck.x) - wide - flare).clip(-9, 9), identity.skin, light=0.93 - 0.1 * neck.x,
        part=Part.BODY, within=neck.cover(neck.y - 2.5) * neck.cover(0.5 - neck.y),
    )  # fmt: skip
    neck.multiply(1 - 0.3 * skin * bump(neck.x, neck.y, 0.06, 1.0, 1.0, 0.75))

    torso = body.patch(-half - 0.3, 1.4, half + 0.3, 4.4)
    x, y = torso.x, torso.y
    side = abs(x)
    # Shoulders slope from the collar, then fall off along a rounded rectangle.
    trunk = box(x, y - 0.28 * side, 0, 4.25, half, 2.6 + 0.08 * (half - 2), 0.85)
    light = 1.05 - 0.1 * x / half - 0.05 * (y - 2)
    light = light * (1 - 0.16 * bump(x, y, 0.15, 1.7, 1.1, 0.6))
    light = light * (1 - 0.1 * ramp(side, half - 0.62, half - 0.5) * ramp(y, 2.2, 2.6))
    opening = _opening(torso, scene.garment)
    cloth = torso.fill(np.maximum(trunk, -opening), clothes, light=light, part=Part.BODY)
    if scene.garment == "striped top":
        stripes = torso.cover(0.18 - 0.2 * abs(wave((y - 0.1 * side) * 1.2)))
        pale = (250, 248, 244) if scene.clothes_name != "white" else (120, 140, 176)
        torso.blend(cloth * stripes, pale, light=light)
    for arm in (-1, 1):
        crease = capsule(x, y, (arm * (half - 0.62), 2.72), (arm * (half - 0.5), 4.4), 0.008, 0.04)
        torso.fill(crease, shade(clothes, 0.6), within=cloth * ramp(y, 2.6, 3.0), opacity=0.5)
    _trim(torso, cloth, scene, opening)
    if geometry.waves:
        upper = body.patch(-3.2, 1.6, 3.2, 4.0)
        outwards = float(geometry.arm_side)
        sleeve = capsule(upper.x, upper.y, (outwards * (half - 0.5), 2.4), (outwards * 2.1, 2.75), 0.5, 0.4)
        upper.fill(sleeve, clothes, light=1.0 - 0.06 * upper.x, part=Part.BODY)


def _opening(torso: Patch, garment: str) -> Plane:
    """Where the garment leaves the neck free."""
    x, y = torso.x, torso.y
    if garment in ("t-shirt", "striped top"):
        return ellipse(x, y, 0, 1.5, 0.72, 0.5)
    if garment == "sweater":
        return (abs(x) * 1.35 + y - 2.55) * 0.6
    if garment == "shirt":
        return (abs(x) * 1.6 + y - 2.2) * 0.53
    return ellipse(x, y, 0, 1.5, 0.62, 0.55)


def _trim(torso: Patch, cloth: Plane, scene: Scene, opening: Plane) -> None:
    x, y = torso.x, torso.y
    dark = shade(scene.clothes, 0.74)
    if scene.garment in ("t-shirt", "striped top", "sweater"):
        torso.fill(abs(opening - 0.05) - 0.06, dark, within=cloth)
    elif scene.garment == "shirt":
        for side in (-1, 1):
            # One wing of the collar; clockwise on the left, so mirrored coordinates serve the right.
            corners = ((-0.5, 1.36), (-0.42, 1.62), (-0.02, 2.12), (-0.44, 2.3), (-0.76, 1.66))
            wing = polygon(-side * x, y, corners)
            torso.fill(wing - 0.02, dark, part=Part.BODY)
            torso.fill(wing + 0.02, shade(scene.clothes, 1.12), light=1.03 - 0.1 * x)
        torso.fill(abs(x) - 0.025, dark, within=cloth * torso.cover(2.3 - y), opacity=0.8)
        for height in (2.62, 3.02, 3.42):
            torso.fill(circle(x, y, 0.09, height, 0.05), shade(scene.clothes, 0.5), opacity=0.9)
    elif scene.garment == "hoodie":
        torso.fill(abs(opening - 0.09) - 0.1, dark, within=cloth)
        for side in (-1, 1):
            cord = capsule(x, y, (side * 0.34, 1.98), (side * 0.38, 2.75), 0.035, 0.045)
            torso.fill(cord, (246, 244, 240))


def draw_arm(arm: Space, geometry: Geometry, identity: Identity, scene: Scene) -> None:
    """Forearm and open hand: (0, 0) is the elbow, the hand is at y = -1.5."""
    patch = arm.patch(-0.6, -2.2, 0.6, 0.5, margin=0.15)
    x, y = patch.x, patch.y
    bare = scene.garment == "t-shirt"
    light = 1.03 - 0.12 * x
    patch.fill(capsule(x, y, (0, 0), (0, -1.2), 0.3, 0.17), identity.skin, light=light, part=Part.ARM)
    thumb = -geometry.arm_side
    fingers = [
        capsule(x, y, (dx * 0.8, -1.5), (dx * 1.45, -1.5 - length), 0.085, 0.07)
        for dx, length in ((-0.21, 0.4), (-0.07, 0.5), (0.08, 0.48), (0.22, 0.38))
    ]
    hand = union(
        box(x, y, 0, -1.4, 0.25, 0.24, 0.16),
        capsule(x, y, (thumb * 0.18, -1.35), (thumb * 0.42, -1.6), 0.09, 0.07),
        *fingers,
    )
    palm = patch.fill(hand, identity.skin, light=light, part=Part.ARM)
    patch.blend(0.3 * palm * bump(x, y, 0.02, -1.38, 0.3, 0.2), shade(identity.skin, 0.8))
    sleeve = capsule(x, y, (0, 0.05), (0, -0.2 if bare else -0.92), 0.4, 0.37 if bare else 0.28)
    patch.fill(sleeve, scene.clothes, light=1.0 - 0.14 * x, part=Part.ARM)
    if not bare:
        patch.fill(oval(x, y + 1.08, 0.29, 0.09, 0.8), shade(scene.clothes, 0.74), part=Part.ARM)
