"""The report page: complete, self-contained, escaped, the same every time."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_deploy.evaluate.film_strip import StripRow, film_strip
from proteus_deploy.evaluate.gate import Bound, Budget, check
from proteus_deploy.evaluate.measurements import VideoMeasurement, evaluation_document
from proteus_deploy.evaluate.metrics import METRICS
from proteus_deploy.evaluate.report import Strip, build_report, write_report

NASTY = "</script><img src=x onerror=alert(1)>\"'&\x00\ud800"
ABOUT: dict[str, Any] = {
    "subject": "two runs",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 8 << 30, "gpu": None},
    "versions": {"torch": "2.13"},
    "commit": "abcdef",
    "settings": {"encoders": "tiny", "networks": {"lpips": "small"}},
}


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def measured(text: str = "ann") -> list[VideoMeasurement]:
    people = (text, "bob")
    return [
        VideoMeasurement(
            f"{person}/{seed}",
            {"psnr": 30.0 + seed + 5 * place, "ssim": None},
            person=person,
            seed=seed,
            settings={"num_inference_steps": 4.0 + 4 * seed},
            reasons={"ssim": f"no reference of {text}"},
        )
        for place, person in enumerate(people)
        for seed in (0, 1)
    ]


def document(text: str = "ann", *, limit: float = 20, baseline: bool = True) -> dict[str, Any]:
    base = [VideoMeasurement(v.case, {"psnr": 33.0}, person=v.person, seed=v.seed) for v in measured(text)]
    gate = check(Budget((Bound("psnr", "min", limit),), name=text), measured(text), known=METRICS)
    metrics = {name: METRICS[name] for name in ("psnr", "ssim")}
    return evaluation_document(
        measured(text), metrics, baseline=base if baseline else None, gate=gate, about=ABOUT
    )


def strip() -> Strip:
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    return Strip(film_strip([StripRow("a", frames)]), "ann: first", "frames of ann")


def test_page_says_what_was_measured() -> None:
    page = Page(build_report(document(), [strip()], "One more is not shown."))
    assert not page.open
    text = " ".join(page.text.split())
    for words in (
        "Evaluation of two runs",
        "✓ passed",
        "All 1 bounds of ann hold",
        "psnr",
        "mean ≥ 20",
        "2026-01-02T03:04:05+00:00",
        "abcdef",
        "8.0 GiB",
        "networks.lpips",
        "not measured: ann/0, ann/1, bob/0 and 1 more: no reference of ann",
        "draw persons, each with all their videos",
        "A change pairs each video",
        "One more is not shown.",
        "ann: first",
    ):
        assert words in text, words


def test_page_gives_the_estimates() -> None:
    """Values 30, 31, 35, 36: mean 33; two persons of means 30.5 and 35.5; 33 in the baseline."""
    text = " ".join(Page(build_report(document())).text.split())
    assert "psnr ↑ dB 33 ± 2.5 30.5 … 35.5 30 … 36 4 33 +0 -2.5 … 2.5" in text


@pytest.mark.parametrize("limit", [20, 40])
def test_failed_gate_says_so(limit: float) -> None:
    text = Page(build_report(document(limit=limit))).text
    assert ("✗ failed" in text) == (limit == 40)
    assert ("33 is below 40" in text) == (limit == 40)


def test_without_gate_and_baseline() -> None:
    plain = evaluation_document(measured(), {"psnr": METRICS["psnr"]}, about={})
    text = Page(build_report(plain)).text
    assert "no gate" in text
    assert "Quality gate" not in text
    assert "change" not in text
    assert "compared with" not in text


def test_plots_follow_the_data() -> None:
    titles = re.findall(r"<title id=[^>]*>([^<]*)", build_report(document()))
    assert titles == ["psnr by person", "psnr, mean", "psnr by num_inference_steps"]
    plain = build_report(document(baseline=False))
    assert "psnr, mean" not in plain
    assert "<title>bound 20</title>" in plain


def test_nothing_is_loaded_from_outside() -> None:
    text = build_report(document(), [strip()])
    page = Page(text)
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key == "src"]
    assert sources
    assert all(value and value.startswith("data:image/png;base64,") for value in sources)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "a", "object"})
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [script["type"] for script in scripts] == ["application/json"]
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_pictures_are_whole_and_described() -> None:
    shown = strip()
    tags = Page(build_report(document(), [shown])).tags
    (image,) = (attributes for tag, attributes in tags if tag == "img")
    assert base64.b64decode((image["src"] or "").split(",", 1)[1]) == shown.png
    assert image["alt"] == "frames of ann"


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    hostile = document(NASTY)
    hostile |= {"subject": NASTY, "commit": NASTY, "settings": {NASTY: [NASTY]}}
    text = build_report(hostile, [Strip(strip().png, NASTY, NASTY)], NASTY)
    page = Page(text)
    assert not page.open
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)
    write_report(tmp_path / "page.html", hostile, [Strip(strip().png, NASTY, NASTY)], NASTY)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text


def test_numbers_can_be_read_back() -> None:
    for text in ("ann", NASTY):
        page = build_report(document(text))
        found = re.search(r'<script type="application/json" id="evaluation">(.*?)</script>', page, re.DOTALL)
        assert found
        assert json.loads(found[1]) == json.loads(json.dumps(document(text)))


def test_same_input_same_page() -> None:
    assert build_report(document(), [strip()]) == build_report(document(), [strip()])


def test_many_people_make_one_row() -> None:
    crowd = [VideoMeasurement(f"v{i}", {"psnr": float(i)}, person=f"p{i}", seed=i) for i in range(31)]
    page = build_report(evaluation_document(crowd, {"psnr": METRICS["psnr"]}, about={}))
    assert "<title id=" in page
    assert "psnr by video" in page
