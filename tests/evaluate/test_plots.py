"""Plots: well-formed, described in words, in the right places, and safe with any text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from proteus_deploy.evaluate.plots import (
    Bar,
    DotRow,
    Line,
    Points,
    bar_plot,
    dot_plot,
    line_plot,
    scatter_plot,
)

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<b>&\"'\x00\ud800"


def parsed(svg: str) -> ET.Element:
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    assert root.tag == f"{SVG}svg"
    return root


def line() -> str:
    y = [0.2, 0.4, None, 0.8]
    low, high = [0.1, 0.3, None, 0.7], [0.3, 0.5, None, 0.9]
    return line_plot("likeness", [1, 2, 3, 4], [Line("arc", y, low, high)], x_label="steps", y_label="cosine")


def bars() -> str:
    return bar_plot("mean", [Bar("base", 2.0, 1.5, 2.5), Bar("ours", -1.0)], unit="dB", limits=[1.0])


def dots() -> str:
    return dot_plot("by person", [DotRow("ann", [1.0, 3.0]), DotRow("bob", [])], unit="dB", limits=[2.0])


def scatter() -> str:
    kinds = [
        Points("front", [("b", 0.5, 30.0), ("a", 0.2, 20.0)], joined=True),
        Points("others", [("c", 0.6, 25.0)]),
    ]
    return scatter_plot("plans", kinds, x_label="work", y_label="dB", limits=[28.0])


@pytest.mark.parametrize("svg", [line(), bars(), dots(), scatter()])
def test_title_and_description_are_named_to_readers(svg: str) -> None:
    root = parsed(svg)
    assert root.get("role") == "img"
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert description is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert "prefers-color-scheme:dark" in svg
    assert "<script" not in svg


def test_description_gives_the_numbers() -> None:
    assert "base 2 (1.5 to 2.5); ours -1" in bars()
    assert "ann: 1, 3; bob: none" in dots()
    assert "arc: 0.2 at 1, 0.4 at 2, 0.8 at 4" in line()


def test_points_are_joined_from_left_to_right_and_named() -> None:
    root = parsed(scatter())
    (path,) = [one for one in root.iter(f"{SVG}path") if one.get("class") == "ln s0"]
    ends = [float(x) for x in re.findall(r"[ML]([\d.]+) ", path.get("d") or "")]
    assert len(ends) == 2
    assert ends == sorted(ends)
    assert sum(one.get("class") == "li" for one in root.iter(f"{SVG}path")) == 1
    assert {"b: 0.5, 30", "a: 0.2, 20", "c: 0.6, 25"} <= {one.text for one in root.iter(f"{SVG}title")}
    assert "dB over work: front: b 30 at 0.5, a 20 at 0.2; others: c 25 at 0.6" in scatter()
    with pytest.raises(ValueError, match="nothing to draw"):
        scatter_plot("none", [Points("front", [])], x_label="x", y_label="y")


def test_ids_differ_between_plots_of_a_page() -> None:
    ids = re.findall(r' id="(\w+)"', line() + bars() + dots() + scatter())
    assert len(ids) == len(set(ids)) == 8
    assert line() == line()


def test_line_is_cut_at_a_gap() -> None:
    """Two values, a gap, one value: one path of two points, one of one, three markers, one band."""
    root = parsed(line())
    paths = [p.get("d", "") for p in root.iter(f"{SVG}path") if "ln" in p.get("class", "")]
    assert [path.count("L") for path in paths] == [1, 0]
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    assert sum("bd" in p.get("class", "") for p in root.iter(f"{SVG}path")) == 1


def test_dots_stand_where_their_values_are() -> None:
    """Dots at 1 and 3, the mean's stroke and the bound at 2 in the middle between them."""
    root = parsed(dots())
    first, second = (float(c.get("cx", "")) for c in root.iter(f"{SVG}circle"))
    stroke, bound = (
        float(re.match(r"M([\d.]+)", p.get("d", "")).group(1))  # type: ignore[union-attr]
        for kind in ("er", "li")
        for p in root.iter(f"{SVG}path")
        if p.get("class") == kind
    )
    assert stroke == bound == pytest.approx((first + second) / 2, abs=0.1)


def test_bars_start_at_zero() -> None:
    base, ours = parsed(bars()).iter(f"{SVG}rect")
    zero = float(base.get("x", ""))
    assert float(ours.get("x", "")) + float(ours.get("width", "")) == pytest.approx(zero, abs=0.11)
    assert float(base.get("width", "")) == pytest.approx(2 * float(ours.get("width", "")), abs=0.11)


def test_series_differ_in_shape() -> None:
    two = [Line("a", [1.0, 2.0]), Line("b", [2.0, 1.0])]
    root = parsed(line_plot("t", [0, 1], two, x_label="x", y_label="y"))
    dashes = {p.get("stroke-dasharray") for p in root.iter(f"{SVG}path") if "ln" in p.get("class", "")}
    assert len(dashes) == 2
    assert len(list(root.iter(f"{SVG}rect"))) == 3  # two points and the legend


def test_text_is_escaped() -> None:
    for svg in (
        line_plot(NASTY, [0, 1], [Line(NASTY, [1, 2]), Line("b", [1, 2])], x_label=NASTY, y_label=NASTY),
        bar_plot(NASTY, [Bar(NASTY, 1.0)], unit=NASTY),
        dot_plot(NASTY, [DotRow(NASTY, [1.0])], unit=NASTY),
    ):
        parsed(svg)
        assert "<b>" not in svg
        svg.encode()


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3e-9, 4e-9], [1e12, 2e12], [0.1, 0.2, 0.30000001]])
def test_any_range_has_ticks_around_it(values: list[float]) -> None:
    root = parsed(dot_plot("t", [DotRow("a", values)], unit=""))
    assert all(56 - 40 <= float(c.get("cx", "")) <= 420 for c in root.iter(f"{SVG}circle"))
    assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == "gr"]) >= 2


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        dot_plot("t", [DotRow("a", [])], unit="")
    with pytest.raises(ValueError, match="nothing to draw"):
        bar_plot("t", [Bar("a", math.nan)], unit="")
    with pytest.raises(ValueError, match="no bars"):
        bar_plot("t", [], unit="")
    with pytest.raises(ValueError, match="has to increase"):
        line_plot("t", [1, 1], [Line("a", [1, 2])], x_label="", y_label="")
    with pytest.raises(ValueError, match="another number of values"):
        line_plot("t", [1, 2], [Line("a", [1, 2], [1])], x_label="", y_label="")
