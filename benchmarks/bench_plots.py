"""The plots of a bench document: bars with their floor, the waterfall of a request, scaling curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proteus_deploy.benchmarks.canvas import CHARACTER, COLOURS, Canvas
from proteus_deploy.benchmarks.whole_request import STAGES

__all__ = ["curve_plot", "plots", "quality_plot", "speed_plot", "step_plot", "waterfall_plot"]

_WIDTH, _RIGHT = 760, 70
_TOP, _ROW, _BOTTOM = 34, 28, 44
_TICKS = 5
_PLANE = 320
_ROOM = 60.0  # for the numbers of an upright axis

Row = Mapping[str, Any]


def plots(document: Mapping[str, Any]) -> dict[str, Canvas]:
    """Every plot that the document has figures for, by the name of its file."""
    ok = [row for row in document["rows"] if row["status"] == "ok"]
    if not ok:
        return {}
    if "scale" in document["settings"]:
        return {"scaling": curve_plot(ok, document["settings"]["scale"])}
    found = {"loops": speed_plot(ok), "steps": step_plot(ok)}
    whole = [row for row in ok if "stages_ms" in row]
    if whole:
        found["waterfall"] = waterfall_plot(whole)
    if near := [row for row in whole if row.get("psnr_db") is not None]:
        found["speed_quality"] = quality_plot(near)
    return found


def speed_plot(rows: Sequence[Row]) -> Canvas:
    """Whole loops: medians in seconds, and the middle three fifths as a stroke."""
    times = [{key: row["latency_ms"][key] / 1e3 for key in ("median", "p20", "p80")} for row in rows]
    return _bars("A whole denoising loop", "seconds", rows, times, [None] * len(rows))


def step_plot(rows: Sequence[Row]) -> Canvas:
    """Steps in milliseconds, each with its floor: all products at the rate measured in the same run."""
    floors = [row.get("floor_ms") for row in rows]
    title = "One step; dashed: its products alone, at the measured rate"
    return _bars(title, "milliseconds", rows, [row["step_ms"] for row in rows], floors)


def _bars(
    title: str,
    unit: str,
    rows: Sequence[Row],
    times: Sequence[Mapping[str, float]],
    floors: Sequence[float | None],
) -> Canvas:
    described = f"{unit}: " + "; ".join(
        f"{row['case']} {_number(time['median'])}" + ("" if floor is None else f", floor {_number(floor)}")
        for row, time, floor in zip(rows, times, floors, strict=True)
    )
    canvas, across = _frame(title, described, rows, max(time["p80"] for time in times), unit)
    for number, (time, floor) in enumerate(zip(times, floors, strict=True)):
        top = _TOP + number * _ROW + 5
        start, end = across(0.0), across(time["median"])
        canvas.bar(start, top, end - start, 18, number % len(COLOURS), f"{_number(time['median'])} {unit}")
        low, high = across(time["p20"]), across(time["p80"])
        canvas.line(((low, top + 9), (high, top + 9)), "ink")
        if floor is not None:
            canvas.line(((across(floor), top - 4), (across(floor), top + 22)), "limit", dashed=True)
        canvas.text(high + 5, top + 14, _number(time["median"]))
    return canvas


def waterfall_plot(rows: Sequence[Row]) -> Canvas:
    """The stages of a request one after another; a stage that is called again is drawn as one."""
    totals = [row["request_ms"]["median"] / 1e3 for row in rows]
    parts = [{name: row["stages_ms"][name]["median"] / 1e3 for name in STAGES} for row in rows]
    described = "seconds: " + "; ".join(
        f"{row['case']} {_number(total)}: "
        + ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in part.items())
        for row, total, part in zip(rows, totals, parts, strict=True)
    )
    longest = max(*totals, *(sum(part.values()) for part in parts))
    title = "A whole request, stage after stage; stroke: the first frames are there"
    canvas, across = _frame(title, described, rows, longest, "seconds", legend=22)
    for number, (row, total, part) in enumerate(zip(rows, totals, parts, strict=True)):
        top, before = _TOP + 22 + number * _ROW + 5, 0.0
        for series, (name, value) in enumerate(part.items()):
            width = across(before + value) - across(before)
            words = f"{name.replace('_', ' ')} {_number(value)} s"
            canvas.bar(across(before), top, width, 18, series, words)
            before += value
        first = across(row["first_frame_ms"]["median"] / 1e3)
        canvas.line(((first, top - 3), (first, top + 21)), "ink")
        canvas.text(max(first, across(before)) + 5, top + 14, _number(total))
    x = 8.0
    for series, name in enumerate(STAGES):
        canvas.bar(x, _TOP - 4, 10, 10, series)
        canvas.text(x + 14, _TOP + 5, name.replace("_", " "))
        x += 30 + CHARACTER * len(name)
    return canvas


def quality_plot(rows: Sequence[Row]) -> Canvas:
    """How near each candidate's video is to the published form's, over the seconds of its request."""
    points = [(row["request_ms"]["median"] / 1e3, float(row["psnr_db"])) for row in rows]
    described = "PSNR in dB over seconds of a request: " + "; ".join(
        f"{row['case']}: {_number(y)} at {_number(x)}" for row, (x, y) in zip(rows, points, strict=True)
    )
    title = "PSNR to the published form's video (100: equal) over the time of a request"
    canvas = Canvas(title, described, _WIDTH, _PLANE + 18 * len(rows))
    step_x, step_y = _step(max(x for x, _ in points) / (_TICKS - 1)), 20.0
    most = step_x * math.ceil(max(x for x, _ in points) / step_x - 1e-9)
    bottom, right = _PLANE - _BOTTOM, _WIDTH - _RIGHT

    def up(value: float) -> float:
        return bottom - value / 100 * (bottom - _TOP)

    for index in range(round(100 / step_y) + 1):
        canvas.line(((_ROOM, up(index * step_y)), (right, up(index * step_y))), "grid")
        canvas.text(_ROOM - 6, up(index * step_y) + 4, f"{index * step_y:.0f} dB", "end")
    for index in range(round(most / step_x) + 1):
        x = _ROOM + index * step_x / most * (right - _ROOM)
        canvas.text(x, bottom + 17, _number(index * step_x), "middle")
    canvas.text((_ROOM + right) / 2, bottom + 36, "seconds of a request", "middle")
    for series, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        canvas.marker(_ROOM + x / most * (right - _ROOM), up(max(y, 0.0)), series, row["case"])
        canvas.marker(_ROOM, _PLANE + 18 * series, series)
        canvas.text(_ROOM + 12, _PLANE + 18 * series + 4, row["case"])
    return canvas


def curve_plot(rows: Sequence[Row], scale: Mapping[str, Any]) -> Canvas:
    """Medians of whole loops over one size, a line for each candidate; both axes logarithmic.

    A slope of one is twice the time for twice the size.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (row["curve"]["x"], row["latency_ms"]["median"] / 1e3)
        lines.setdefault(row["case"], []).append(point)
    described = f"seconds of a loop over {scale['x_label']}: " + "; ".join(
        f"{case}: " + ", ".join(f"{_number(y)} at {_number(x)}" for x, y in line)
        for case, line in lines.items()
    )
    below = 18 * len(lines)
    title = f"A whole denoising loop over {scale['x_label']}, both axes logarithmic"
    canvas = Canvas(title, described, _WIDTH, _PLANE + below)
    xs = sorted({x for line in lines.values() for x, _ in line})
    ys = [y for line in lines.values() for _, y in line]
    levels = _powers(min(ys), max(ys))
    bottom = _PLANE - _BOTTOM
    across = _logarithmic(xs[0], xs[-1], _ROOM + 10, _WIDTH - _RIGHT)
    up = _logarithmic(levels[0], levels[-1], bottom, _TOP)
    for level in levels:
        canvas.line(((_ROOM, up(level)), (_WIDTH - _RIGHT, up(level))), "grid")
        canvas.text(_ROOM - 6, up(level) + 4, f"{_number(level)} s", "end")
    for x in xs:
        canvas.text(across(x), bottom + 17, _number(x), "middle")
    canvas.text((_ROOM + _WIDTH - _RIGHT) / 2, bottom + 36, str(scale["x_label"]), "middle")
    for series, (case, line) in enumerate(lines.items()):
        points = [(across(x), up(y)) for x, y in sorted(line)]
        canvas.line(points, series, dashed=series % 2 == 1)
        for x, y in points:
            canvas.marker(x, y, series, case)
        legend = _PLANE + 18 * series
        canvas.marker(_ROOM, legend, series)
        canvas.text(_ROOM + 12, legend + 4, case)
    return canvas


def _frame(
    title: str, described: str, rows: Sequence[Row], longest: float, unit: str, *, legend: int = 0
) -> tuple[Canvas, Callable[[float], float]]:
    """A canvas with a labelled row for each candidate above an axis from zero; seconds or ms -> pixels."""
    top, bottom = _TOP + legend, _TOP + legend + _ROW * len(rows)
    left = 14 + CHARACTER * max(len(row["case"]) for row in rows)
    canvas = Canvas(title, described, _WIDTH, bottom + _BOTTOM)
    step = _step(longest / (_TICKS - 1))
    end = step * max(math.ceil(longest / step - 1e-9), 1)

    def across(value: float) -> float:
        return left + value / end * (_WIDTH - _RIGHT - left)

    for index in range(round(end / step) + 1):
        x = across(index * step)
        canvas.line(((x, top), (x, bottom)), "grid")
        canvas.text(x, bottom + 16, _number(index * step), "middle")
    canvas.text((left + _WIDTH - _RIGHT) / 2, bottom + 34, unit, "middle")
    for number, row in enumerate(rows):
        canvas.text(left - 8, top + number * _ROW + 19, row["case"], "end")
    return canvas, across


def _step(rough: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    levels = [factor * 10.0**power for power in range(first, last) for factor in (1, 2, 5)]
    start = max(index for index, level in enumerate(levels) if level <= low * 1.001)
    end = next((index for index, level in enumerate(levels) if level >= high * 0.999 and index > start), None)
    return levels[start : None if end is None else end + 1]


def _logarithmic(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: first + math.log(value / low) / span * (last - first)


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 1 else f"{value:.3g}"
