"""Small plots as inline SVG: lines with a band, points in a plane, bars with error bars, dots by row.

Each has a title and a description for screen readers, follows the page's light or dark mode, and tells its
series apart by shape as well as by colour; the colours are those of Okabe and Ito (Color Universal Design,
2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TypeVar

__all__ = ["Bar", "DotRow", "Line", "Points", "bar_plot", "dot_plot", "line_plot", "scatter_plot"]

T = TypeVar("T")

_WIDTH = 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 34, 40
_LINE_HEIGHT = 240
_ROW = 26
_TICKS = 5
_CHARACTER = 6.4  # width of a letter at the font size below, in pixels
_LONGEST_LABEL = 26

_STYLE = (
    "<style>"
    ".pl{font:12px system-ui,sans-serif;fill:#1d2129}.pl .ti{font-weight:600;font-size:13px}"
    ".pl .ax{stroke:#8a919e;fill:none}.pl .gr{stroke:#8a919e;stroke-opacity:.25}"
    ".pl .li{stroke:#D55E00;stroke-dasharray:5 3;stroke-width:1.5;fill:none}"
    ".pl .er{stroke:#1d2129;stroke-width:1.5;fill:none}"
    ".pl .s0{fill:#0072B2;stroke:#0072B2}.pl .s1{fill:#E69F00;stroke:#B97F00}"
    ".pl .s2{fill:#009E73;stroke:#009E73}.pl .s3{fill:#CC79A7;stroke:#CC79A7}"
    ".pl .ln{fill:none;stroke-width:2}.pl .bd{stroke:none;fill-opacity:.18}.pl .ba{fill-opacity:.75}"
    "@media(prefers-color-scheme:dark){.pl{fill:#e8eaef}.pl .er{stroke:#e8eaef}"
    ".pl .s0{fill:#56B4E9;stroke:#56B4E9}.pl .s1{stroke:#E69F00}}"
    "</style>"
)
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Line:
    """A series over x. y, and where known the ends of its interval, one for each x; None is a gap."""

    name: str
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Points:
    """Named points (name, x, y) of one kind. joined: with a line through them, from left to right."""

    kind: str
    points: Sequence[tuple[str, float, float]]
    joined: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its interval, where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DotRow:
    """Values of one row, such as the seeds of a person; `label` is what the row is."""

    label: str
    values: Sequence[float]


def line_plot(title: str, x: Sequence[float], lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Lines over x, each with its interval as a band. x: increasing numbers, one for each value of a line.

    Raises ValueError for no finite value, x that doesn't increase, or lengths that differ.
    """
    if not x or any(not a < b for a, b in pairwise(x)):
        raise ValueError(f"x is {list(x)}; it has to increase")
    for line in lines:
        if any(len(values) != len(x) for values in (line.y, line.low or x, line.high or x)):
            raise ValueError(f"the line {line.name!r} has another number of values than x")
    ticks_y = _ticks([v for line in lines for part in (line.y, line.low, line.high) for v in part])
    ticks_x = list(x) if len(x) <= _TICKS else _ticks(x)
    across = _scale(min(x[0], ticks_x[0]), max(x[-1], ticks_x[-1]), _LEFT, _WIDTH - _RIGHT)
    up = _scale(ticks_y[0], ticks_y[-1], _LINE_HEIGHT - _BOTTOM, _TOP)
    parts = _plane(ticks_x, ticks_y, across, up, x_label)
    for number, line in enumerate(lines):
        parts += _band(number, x, line, across, up)
        for run in _runs(x, line.y):
            path = "M" + "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in run)
            dash = _DASHES[number % len(_DASHES)]
            parts.append(
                f'<path class="ln s{number % 4}" style="fill:none" stroke-dasharray="{dash}" d="{path}"/>'
            )
            parts += [_marker(number, across(a), up(b)) for a, b in run]
    if len(lines) > 1:
        parts += _legend([line.name for line in lines])
    described = f"{y_label} over {x_label}: " + "; ".join(
        f"{line.name}: "
        + ", ".join(f"{_number(b)} at {_number(a)}" for a, b in zip(x, line.y, strict=True) if b is not None)
        for line in lines
    )
    return _svg(title, described, parts, _LINE_HEIGHT)


def scatter_plot(
    title: str, kinds: Sequence[Points], *, x_label: str, y_label: str, limits: Sequence[float] = ()
) -> str:
    """Points in a plane, each kind with a shape of its own; `limits` of y are drawn as dashed lines.

    Raises ValueError for no point at all or a coordinate that is not finite.
    """
    points = [point for one in kinds for point in one.points]
    ticks_x, ticks_y = _ticks([x for _, x, _ in points]), _ticks([*limits, *(y for _, _, y in points)])
    across = _scale(ticks_x[0], ticks_x[-1], _LEFT, _WIDTH - _RIGHT)
    up = _scale(ticks_y[0], ticks_y[-1], _LINE_HEIGHT - _BOTTOM, _TOP)
    parts = _plane(ticks_x, ticks_y, across, up, x_label)
    for limit in limits:
        parts.append(f'<path class="li" d="M{_LEFT} {up(limit):.1f}H{_WIDTH - _RIGHT}"/>')
    for number, one in enumerate(kinds):
        ordered = sorted(one.points, key=lambda point: point[1])
        if one.joined and len(ordered) > 1:
            path = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for _, x, y in ordered)
            parts.append(f'<path class="ln s{number % 4}" style="fill:none" d="{path}"/>')
        for name, x, y in ordered:
            shown = f"<title>{_safe(f'{name}: {_number(x)}, {_number(y)}')}</title>"
            parts.append(f"<g>{shown}{_marker(number, across(x), up(y))}</g>")
    parts += _legend([one.kind for one in kinds])
    described = f"{y_label} over {x_label}: " + "; ".join(
        f"{one.kind}: " + ", ".join(f"{name} {_number(y)} at {_number(x)}" for name, x, y in one.points)
        for one in kinds
    )
    return _svg(title, described, parts, _LINE_HEIGHT)


def bar_plot(title: str, bars: Sequence[Bar], *, unit: str, limits: Sequence[float] = ()) -> str:
    """Horizontal bars from zero with their intervals as error bars; `limits` are drawn as dashed lines.

    Raises ValueError for no bars or a value that is not finite.
    """
    if not bars:
        raise ValueError("no bars")
    ends = [bar.low for bar in bars] + [bar.high for bar in bars]
    left = _label_room([bar.name for bar in bars])
    ticks = _ticks([0.0, *limits, *(bar.value for bar in bars), *ends])
    across = _scale(ticks[0], ticks[-1], left, _WIDTH - _RIGHT)
    parts = _columns(ticks, across, len(bars), unit)
    for number, bar in enumerate(bars):
        middle = _TOP + (number + 0.5) * _ROW
        start, end = sorted((across(0.0), across(bar.value)))
        parts.append(_text(left - 6, middle + 4, _short(bar.name), "end"))
        parts.append(
            f'<rect class="ba s{number % 4}" x="{start:.1f}" y="{middle - 8:.1f}" '
            f'width="{max(end - start, 0.5):.1f}" height="16"/>'
        )
        if bar.low is not None and bar.high is not None:
            low, high = across(bar.low), across(bar.high)
            parts.append(
                f'<path class="er" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 5:.1f}v10'
                f'M{high:.1f} {middle - 5:.1f}v10"/>'
            )
    parts += _limits(limits, across, len(bars))
    described = f"{unit or 'value'}: " + "; ".join(
        f"{bar.name} {_number(bar.value)}"
        + (
            f" ({_number(bar.low)} to {_number(bar.high)})"
            if bar.low is not None and bar.high is not None
            else ""
        )
        for bar in bars
    )
    return _svg(title, described, parts, _TOP + len(bars) * _ROW + _BOTTOM)


def dot_plot(title: str, rows: Sequence[DotRow], *, unit: str, limits: Sequence[float] = ()) -> str:
    """Every value as a dot in its row, and the mean of the row as an upright stroke.

    Raises ValueError for no value at all or one that is not finite.
    """
    left = _label_room([row.label for row in rows])
    ticks = _ticks([*limits, *(value for row in rows for value in row.values)])
    across = _scale(ticks[0], ticks[-1], left, _WIDTH - _RIGHT)
    parts = _columns(ticks, across, len(rows), unit)
    for number, row in enumerate(rows):
        middle = _TOP + (number + 0.5) * _ROW
        parts.append(_text(left - 6, middle + 4, _short(row.label), "end"))
        parts += [
            f'<circle class="s0" fill-opacity=".6" cx="{across(value):.1f}" cy="{middle:.1f}" r="4"/>'
            for value in row.values
        ]
        if row.values:
            mean = across(math.fsum(row.values) / len(row.values))
            parts.append(f'<path class="er" d="M{mean:.1f} {middle - 9:.1f}v18"/>')
    parts += _limits(limits, across, len(rows))
    described = f"{unit or 'value'}: " + "; ".join(
        f"{row.label}: {', '.join(map(_number, row.values)) or 'none'}" for row in rows
    )
    return _svg(title, described, parts, _TOP + len(rows) * _ROW + _BOTTOM)


def _svg(title: str, described: str, parts: Sequence[str], height: int) -> str:
    body = "".join(parts)
    # Labels need ids that no other plot of the page has; equal plots may share theirs.
    title, described = _safe(title), _safe(described)
    name = "p" + hashlib.sha256(f"{title}{described}{body}".encode()).hexdigest()[:12]
    return (
        f'<svg class="pl" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{title}</title><desc id="{name}d">{described}</desc>'
        f'{_STYLE}<text class="ti" x="6" y="18">{title}</text>{body}</svg>'
    )


def _plane(
    ticks_x: Sequence[float],
    ticks_y: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_label: str,
) -> list[str]:
    """Level grid lines with their numbers, the numbers of x, and its label."""
    parts = []
    for tick in ticks_y:
        parts.append(f'<path class="gr" d="M{_LEFT} {up(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, up(tick) + 4, _number(tick), "end"))
    parts += [_text(across(tick), _LINE_HEIGHT - _BOTTOM + 16, _number(tick), "middle") for tick in ticks_x]
    return [*parts, _text((_LEFT + _WIDTH) / 2, _LINE_HEIGHT - 6, x_label, "middle")]


def _columns(ticks: Sequence[float], across: Callable[[float], float], rows: int, unit: str) -> list[str]:
    """Upright grid lines with their numbers, and the unit below."""
    bottom = _TOP + rows * _ROW
    parts = []
    for tick in ticks:
        parts.append(f'<path class="gr" d="M{across(tick):.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(across(tick), bottom + 15, _number(tick), "middle"))
    middle = (across(ticks[0]) + across(ticks[-1])) / 2
    return [*parts, _text(middle, bottom + 32, unit, "middle")]


def _limits(limits: Sequence[float], across: Callable[[float], float], rows: int) -> list[str]:
    bottom = _TOP + rows * _ROW
    return [
        f'<path class="li" d="M{across(limit):.1f} {_TOP - 4}V{bottom}">'
        f"<title>bound {_number(limit)}</title></path>"
        for limit in limits
    ]


def _band(
    number: int,
    x: Sequence[float],
    line: Line,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[str]:
    ends = zip(line.low or [None] * len(x), line.high or [None] * len(x), strict=True)
    pairs = [None if low is None or high is None else (low, high) for low, high in ends]
    parts = []
    for run in _runs(x, pairs):
        if len(run) == 1:  # a band of no width would not be seen
            a, (low, high) = run[0]
            parts.append(f'<path class="er" d="M{across(a):.1f} {up(low):.1f}V{up(high):.1f}"/>')
            continue
        there = [f"{across(a):.1f} {up(high):.1f}" for a, (_, high) in run]
        back = [f"{across(a):.1f} {up(low):.1f}" for a, (low, _) in reversed(run)]
        parts.append(f'<path class="bd s{number % 4}" d="M{"L".join(there + back)}Z"/>')
    return parts


def _runs(x: Sequence[float], values: Sequence[T | None]) -> list[list[tuple[float, T]]]:
    """(x, value) pairs, cut where a value is missing."""
    runs: list[list[tuple[float, T]]] = [[]]
    for a, value in zip(x, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((a, value))
    return [run for run in runs if run]


def _marker(number: int, x: float, y: float) -> str:
    shapes = (
        f'<circle class="s0" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>',
        f'<rect class="s1" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>',
        f'<path class="s2" d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z"/>',
        f'<path class="s3" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>',
    )
    return shapes[number % 4]


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT + 4)
    for number, name in enumerate(names):
        parts += [_marker(number, x, _TOP - 6), _text(x + 8, _TOP - 2, _short(name), "start")]
        x += 24 + _CHARACTER * len(_short(name))
    return parts


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Maps low..high to first..last pixels."""
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _ticks(values: Sequence[float | None]) -> list[float]:
    """Round numbers that enclose the values: steps of 1, 2 or 5 times a power of ten."""
    known = [value for value in values if value is not None]
    if not known or not all(math.isfinite(value) for value in known):
        raise ValueError(f"values {list(values)} hold no finite numbers alone; there is nothing to draw")
    low, high = min(known), max(known)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    rough = (high - low) / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _label_room(labels: Sequence[str]) -> float:
    return 16 + _CHARACTER * max((len(_short(label)) for label in labels), default=0)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _safe(text: str) -> str:
    """Escaped, and without the control characters that XML has no way to write."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'
