"""A drawing that becomes an inline SVG or a PNG: bars, lines, markers and text, in pixels from the top left.

Both show the same. The SVG takes ink from its page, light or dark, and says in words what it shows; the PNG
is dark on white, drawn with Pillow at twice the size. Series have the colours of Okabe and Ito (Color
Universal Design, 2008); who draws tells them apart by shape or label as well.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from math import ceil, hypot
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

__all__ = ["CHARACTER", "COLOURS", "Canvas"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A919E")
CHARACTER = 6.4  # width of a letter, pixels

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]

_INK, _FAINT, _LIMIT = "#1D2129", "#B9BEC7", "#A33C00"
_FONT = 12
_SCALE = 2
_DASH = (6.0, 4.0)
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


@dataclass
class Canvas:
    """title: drawn above. described: the same figures in words, for who can't see them. Sizes in pixels."""

    title: str
    described: str
    width: int
    height: int
    _shapes: list[_Shape] = field(default_factory=list)

    def bar(self, x: float, y: float, width: float, height: float, series: int, note: str = "") -> None:
        """A filled rectangle; note: shown when it is pointed at."""
        corners = ((x, y), (x + max(width, 0.5), y + height))
        self._shapes.append(_Shape("bar", corners, COLOURS[series % len(COLOURS)], note=note))

    def cell(self, x: float, y: float, width: float, height: float, colour: str, note: str = "") -> None:
        """A filled rectangle of any colour, "#RRGGBB"; note: shown when it is pointed at."""
        self._shapes.append(_Shape("bar", ((x, y), (x + width, y + height)), colour, note=note))

    def line(
        self, points: Sequence[Point], kind: Literal["grid", "ink", "limit"] | int, *, dashed: bool = False
    ) -> None:
        """Through the points; kind: what it is for, or the number of a series."""
        inks = {"grid": _FAINT, "ink": _INK, "limit": _LIMIT}
        colour = COLOURS[kind % len(COLOURS)] if isinstance(kind, int) else inks[kind]
        self._shapes.append(
            _Shape("line", tuple(points), colour, dashed=dashed, width=1 if kind == "grid" else 2)
        )

    def marker(self, x: float, y: float, series: int, note: str = "") -> None:
        """A disc, square, triangle or diamond, by the series."""
        outline: Sequence[Point]
        if series % 4 == 0:
            self._shapes.append(_Shape("disc", ((x, y),), COLOURS[series % len(COLOURS)], note=note))
            return
        if series % 4 == 1:
            outline = ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5))
        elif series % 4 == 2:
            outline = ((0, -4.5), (4.5, 3.5), (-4.5, 3.5))
        else:
            outline = ((0, -5), (5, 0), (0, 5), (-5, 0))
        points = tuple((x + a, y + b) for a, b in outline)
        self._shapes.append(_Shape("area", points, COLOURS[series % len(COLOURS)], note=note))

    def text(self, x: float, y: float, words: str, anchor: Anchor = "start", *, bold: bool = False) -> None:
        """One line of text; y is its baseline."""
        self._shapes.append(_Shape("text", ((x, y),), _INK, note=words, anchor=anchor, bold=bold))

    def svg(self) -> str:
        """An inline <svg> element."""
        body = "".join(shape.svg() for shape in (*self._heading(), *self._shapes))
        title, described = _safe(self.title), _safe(self.described)
        name = "c" + hashlib.sha256(f"{title}{described}{body}".encode()).hexdigest()[:12]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-labelledby="{name}t {name}d" '
            f'style="font:{_FONT}px system-ui,sans-serif"><title id="{name}t">{title}</title>'
            f'<desc id="{name}d">{described}</desc>{body}</svg>'
        )

    def png(self) -> bytes:
        """The file's bytes; equal drawings give equal ones."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (_SCALE * self.width, _SCALE * self.height), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(_SCALE * _FONT)
        for shape in (*self._heading(), *self._shapes):
            shape.draw(draw, font)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def _heading(self) -> list[_Shape]:
        return [_Shape("text", ((6, 18),), _INK, note=self.title, bold=True)]


@dataclass(frozen=True)
class _Shape:
    kind: Literal["bar", "line", "disc", "area", "text"]
    points: tuple[Point, ...]
    colour: str
    note: str = ""
    anchor: Anchor = "start"
    bold: bool = False
    dashed: bool = False
    width: int = 1

    def svg(self) -> str:
        (x, y), ink = self.points[0], "currentColor" if self.colour == _INK else self.colour
        title = f"<title>{_safe(self.note)}</title>" if self.note else ""
        if self.kind == "text":
            weight = ' font-weight="600"' if self.bold else ""
            place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{self.anchor}"'
            return f'<text {place}{weight} fill="{ink}">{_safe(self.note)}</text>'
        if self.kind == "bar":
            right, bottom = self.points[1]
            size = f'width="{right - x:.1f}" height="{bottom - y:.1f}"'
            return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{ink}">{title}</rect>'
        if self.kind == "disc":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ink}">{title}</circle>'
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in self.points)
        if self.kind == "area":
            return f'<path d="{path}Z" fill="{ink}">{title}</path>'
        dash = f' stroke-dasharray="{_DASH[0]:g} {_DASH[1]:g}"' if self.dashed else ""
        return f'<path d="{path}" fill="none" stroke="{ink}" stroke-width="{self.width}"{dash}/>'

    def draw(self, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
        points = [(_SCALE * x, _SCALE * y) for x, y in self.points]
        if self.kind == "text":
            stroke = 0.5 if self.bold else 0
            words = "".join(c if c.isprintable() else " " for c in self.note)
            anchor = _ANCHORS[self.anchor]
            draw.text(points[0], words, fill=self.colour, font=font, anchor=anchor, stroke_width=stroke)
        elif self.kind == "bar":
            draw.rectangle(points, fill=self.colour)
        elif self.kind == "disc":
            (x, y), radius = points[0], _SCALE * 3.5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=self.colour)
        elif self.kind == "area":
            draw.polygon(points, fill=self.colour)
        else:
            for start, end in _dashes(points) if self.dashed else pairwise(points):
                draw.line((*start, *end), fill=self.colour, width=_SCALE * self.width)


def _dashes(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Pillow draws whole lines only."""
    on, off = (_SCALE * length for length in _DASH)
    parts = []
    for (x, y), (right, bottom) in pairwise(points):
        length = hypot(right - x, bottom - y)
        for number in range(ceil(length / (on + off))):
            first = number * (on + off) / length
            last = min(first + on / length, 1.0)
            across, down = right - x, bottom - y
            ends = ((x + at * across, y + at * down) for at in (first, last))
            parts.append((next(ends), next(ends)))
    return parts


def _safe(text: str) -> str:
    """Escaped, and without the control characters that XML has no way to write."""
    return escape("".join(c if c.isprintable() else " " for c in text))
