"""Plots and pages of bench documents: what is drawn is what was measured."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from proteus_deploy.benchmarks.bench_page import page, write_plots
from proteus_deploy.benchmarks.bench_plots import (
    curve_plot,
    plots,
    quality_plot,
    step_plot,
    waterfall_plot,
)
from proteus_deploy.benchmarks.canvas import COLOURS, Canvas
from proteus_deploy.benchmarks.whole_request import STAGES

SVG = "{http://www.w3.org/2000/svg}"


def spread(median: float) -> dict[str, float]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "n": 3}


def row(case: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    return {
        "case": case,
        "status": "ok",
        "latency_ms": spread(milliseconds),
        "step_ms": spread(milliseconds / 50),
        "floor_ms": 10.0,
        **more,
    }


def rectangles(canvas: Canvas) -> list[ET.Element]:
    return ET.fromstring(canvas.svg()).findall(f"{SVG}rect")  # noqa: S314 - our own


def test_bars_are_as_long_as_what_was_measured() -> None:
    canvas = step_plot([row("a:b:c", 1000.0), row("d:e:f", 4000.0, floor_ms=None)])
    one, two = (float(bar.get("width", 0)) for bar in rectangles(canvas))
    assert two == pytest.approx(4 * one, rel=0.01)
    assert canvas.svg().count("stroke-dasharray") == 1  # a floor only where there is one
    assert "d:e:f 80" in canvas.described
    assert "a:b:c 20, floor 10" in canvas.described


def test_a_waterfall_is_made_of_all_stages_end_to_end() -> None:
    stages = {name: spread(100.0 * (number + 1)) for number, name in enumerate(STAGES)}
    total = sum(stage["median"] for stage in stages.values())
    one = row("a:b:c", 1.0, stages_ms=stages, request_ms=spread(total), first_frame_ms=spread(total - 500))
    bars = [bar for bar in rectangles(waterfall_plot([one])) if bar.get("height") == "18.0"]
    assert [bar.get("fill") for bar in bars] == list(COLOURS)
    ends = [float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars]
    assert [float(bar.get("x", 0)) for bar in bars[1:]] == pytest.approx(ends[:-1], abs=0.2)
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[6] / widths[1] == pytest.approx(700 / 200, rel=0.02)


def test_twice_the_time_for_twice_the_size_is_a_straight_line() -> None:
    rows = [row("a:b:c", 1000.0 * x, curve={"x": x}) for x in (1, 2, 4)]
    canvas = curve_plot(rows, {"x_label": "videos at once"})
    discs = ET.fromstring(canvas.svg()).findall(f"{SVG}circle")[:3]  # noqa: S314 - our own
    places = [(float(disc.get("cx", 0)), float(disc.get("cy", 0))) for disc in discs]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x1 - x0, y0 - y1) == pytest.approx((x2 - x1, y1 - y2), abs=0.2)
    assert x1 > x0
    assert y1 < y0


def test_videos_by_speed_and_nearness() -> None:
    """Twice the time stands twice as far to the right of the axis, and more dB higher up."""
    rows = [
        row("a:b:c", 1.0, request_ms=spread(2000.0), psnr_db=100.0),
        row("d:e:f", 1.0, request_ms=spread(4000.0), psnr_db=100.0),
        row("g:h:i", 1.0, request_ms=spread(4000.0), psnr_db=30.0),
    ]
    canvas = quality_plot(rows)
    found = ET.fromstring(canvas.svg())  # noqa: S314 - our own
    disc, legend = found.findall(f"{SVG}circle")
    square = next(path for path in found.findall(f"{SVG}path") if path.get("fill") == COLOURS[1])
    axis, x = float(legend.get("cx", 0)), float(disc.get("cx", 0))
    corner = [float(number) for number in square.get("d", "")[1:].split("L")[0].split()]
    assert corner[0] + 3.5 - axis == pytest.approx(2 * (x - axis), abs=0.2)
    assert corner[1] + 3.5 == pytest.approx(float(disc.get("cy", 0)), abs=0.2)
    assert "g:h:i: 30 at 4" in canvas.described


def test_a_curve_of_one_point_is_drawn() -> None:
    rows = [row("a:b:c", 1000.0, curve={"x": 17})]
    assert "1 at 17" in curve_plot(rows, {"x_label": "frames"}).described


def test_png_and_svg_are_of_one_drawing() -> None:
    canvas = Canvas("title <&>", "words", 120, 60)
    canvas.bar(10, 30, 50, 20, 2)
    canvas.line(((0, 55), (120, 55)), "limit", dashed=True)
    canvas.text(60, 28, "x", "middle")
    for series in range(4):
        canvas.marker(80 + 10 * series, 40, series)
    with Image.open(io.BytesIO(canvas.png())) as image:
        assert image.size == (240, 120)
        assert image.getpixel((60, 80)) == (0x00, 0x9E, 0x73)
        assert image.getpixel((160, 80)) == (0x00, 0x72, 0xB2)
        dashed = [image.getpixel((x, 110)) for x in range(240)]
    assert 0.4 < sum(pixel == (0xA3, 0x3C, 0x00) for pixel in dashed) / 240 < 0.8
    assert canvas.png() == canvas.png()
    assert "title &lt;&amp;&gt;" in canvas.svg()


def test_a_document_in_which_nothing_ran_has_no_plots(tmp_path: Path) -> None:
    document = {"rows": [{"status": "failed"}], "settings": {}}
    assert plots(document) == {}
    assert write_plots(document, tmp_path) == []


def test_names_are_escaped_in_pages() -> None:
    document = {
        "what": "a & b",
        "machine": {"cpu": "<cpu>", "cores": 2, "gpu": None},
        "versions": {"torch": "2"},
        "commit": "abc",
        "settings": {
            "size": "<script>",
            "steps": 1,
            "rounds": 1,
            "device": "cpu",
            "video": {"num_frames": 1, "height": 8, "width": 8},
        },
        "rows": [row("a:b:c", 1.0)],
    }
    text = page(document)
    assert "<script" not in text
    assert "&lt;cpu&gt;" in text
    assert text.count("<svg") == 2
