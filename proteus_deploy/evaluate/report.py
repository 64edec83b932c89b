"""An evaluation as one HTML page: it needs nothing but itself, so that it can be mailed and kept.

Pictures are data URIs, plots are inline SVG, the numbers stand at the end as JSON, and a content policy keeps
the browser from loading anything. There is no script. All text from outside is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file, without_nan
from proteus_deploy.evaluate.measurements import group_reasons
from proteus_deploy.evaluate.plots import Bar, DotRow, Line, bar_plot, dot_plot, line_plot
from proteus_deploy.evaluate.report_style import STYLE
from proteus_deploy.evaluate.statistics import estimate

__all__ = ["Strip", "build_report", "write_report"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MOST_ROWS = 30  # of a dot plot; more people than this make one row
_BETTER = {"higher": "higher is better", "lower": "lower is better", "neither": "neither way is better"}
_ARROW = {"higher": " ↑", "lower": " ↓", "neither": ""}
_GIB = 1 << 30


@dataclass(frozen=True)
class Strip:
    """A picture for the page. caption: what it shows; alt: the same for those who can't see it."""

    png: bytes
    caption: str
    alt: str


def write_report(
    path: Path, document: Mapping[str, Any], strips: Sequence[Strip] = (), note: str = ""
) -> None:
    """Write `build_report` of the same arguments, atomically."""
    page = build_report(document, strips, note)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build_report(document: Mapping[str, Any], strips: Sequence[Strip] = (), note: str = "") -> str:
    """The page of one evaluation; the same arguments give the same text.

    document: of `measurements.evaluation_document`. strips: film strips, in order. note: said above them,
    such as how many were left out.
    """
    document = without_nan(document)
    subject = document.get("subject") or "videos"
    parts = [
        f"<h1>Evaluation of {_text(subject)}</h1>",
        _verdict(document.get("gate")),
        _facts(document),
        _gate(document.get("gate")),
        _metrics(document),
        _strips(strips, note),
        _plots(document),
        _videos(document),
        _provenance(document),
        _raw(document),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation of {_text(subject)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _verdict(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return '<p><span class="badge none">no gate</span> No budget was given, so nothing was bounded.</p>'
    rows = gate["rows"]
    failed = sum(not row["passed"] for row in rows)
    if gate["passed"]:
        return (
            f'<p><span class="badge good">✓ passed</span> All {len(rows)} bounds of '
            f"{_text(gate['budget'])} hold.</p>"
        )
    return (
        f'<p><span class="badge bad">✗ failed</span> {failed} of {len(rows)} bounds of '
        f"{_text(gate['budget'])} do not hold.</p>"
    )


def _facts(document: Mapping[str, Any]) -> str:
    videos = document["videos"]
    facts: dict[str, Any] = {
        "date": document.get("date"),
        "videos": len(videos),
        "persons": len({video["person"] for video in videos} - {None}) or "not named",
        "seeds": ", ".join(map(str, sorted({video["seed"] for video in videos} - {None}))) or "not known",
        "compared with": document.get("baseline_name"),
        "commit": document.get("commit"),
    }
    machine = document.get("machine") or {}
    facts["machine"] = ", ".join(str(machine[key]) for key in ("cpu", "gpu") if machine.get(key))
    return _definitions(facts)


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return ""
    rows = []
    for row in gate["rows"]:
        badge = (
            '<span class="badge good">✓ passed</span>'
            if row["passed"]
            else '<span class="badge bad">✗ failed</span>'
        )
        cells = (row["metric"], row["bound"], _number(row["value"]), _interval(row), row["n"])
        rows.append(
            (*map(_text, cells), badge + (f"<small>{_text(row['reason'])}</small>" if row["reason"] else ""))
        )
    heads = ("metric", "bound", "value", f"{gate['confidence']:.0%} interval", "videos", "result")
    return "<h2>Quality gate</h2>\n" + _table(heads, rows, numeric=(2, 3, 4))


def _metrics(document: Mapping[str, Any]) -> str:
    compared = document.get("baseline_videos") is not None
    confidence = next((row["estimate"]["confidence"] for row in document["metrics"] if row["estimate"]), None)
    interval = "interval" if confidence is None else f"{confidence:.0%} interval"
    heads = ["metric", "unit", "mean ± standard error", interval, "lowest … highest", "videos"]
    if compared:
        heads += ["baseline", "change", "its interval"]
    rows, meanings = [], {}
    for row in document["metrics"]:
        found = row["estimate"]
        cells = [row["metric"] + _ARROW[row["better"]], row["unit"], _mean(found), _interval(found)]
        cells += [f"{found['minimum']:.4g} … {found['maximum']:.4g}" if found else "not measured"]
        cells += [found["n"] if found else 0]
        if compared:
            theirs, change = row["baseline"], row["difference"]
            cells += [_number(theirs and theirs["mean"]), _number(change and change["mean"], "+")]
            cells.append(_interval(change))
        rows.append(tuple(map(_text, cells)))
        meanings[row["metric"]] = f"{row['meaning']}; {_BETTER[row['better']]}"
        if row["not_measured"]:
            meanings[row["metric"]] += f" (not measured: {group_reasons(row['not_measured'])})"
    table = _table(heads, rows, numeric=tuple(range(2, len(heads))))
    return f"<h2>Metrics</h2>\n{table}{_how(document)}{_definitions(meanings)}"


def _mean(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    error = found["standard_error"]
    return _number(found["mean"]) + ("" if error is None else f" ± {error:.2g}")


def _how(document: Mapping[str, Any]) -> str:
    """One sentence on where the intervals come from."""
    drawn = {row["estimate"]["resampled"] for row in document["metrics"] if row["estimate"]}
    what = "persons, each with all their videos" if drawn == {"person"} else "videos"
    text = f"Intervals are percentile bootstraps that draw {what}; with few of them they are too narrow."
    if document.get("baseline_videos") is not None:
        text += " A change pairs each video with the baseline's video of the same case."
    return f'<p class="soft">{_text(text)}</p>'


def _strips(strips: Sequence[Strip], note: str) -> str:
    if not strips and not note:
        return ""
    parts = ["<h2>Videos side by side</h2>"]
    if note:
        parts.append(f'<p class="soft">{_text(note)}</p>')
    for strip in strips:
        data = base64.b64encode(strip.png).decode("ascii")
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{_text(strip.alt)}">'
            f"<figcaption>{_text(strip.caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _plots(document: Mapping[str, Any]) -> str:
    plots = [
        f'<div class="plots">{"".join(_plots_of(row, document))}</div>'
        for row in document["metrics"]
        if row["estimate"] is not None
    ]
    return "" if not plots else "<h2>Plots</h2>\n" + "\n".join(plots)


def _plots_of(row: Mapping[str, Any], document: Mapping[str, Any]) -> Iterable[str]:
    name, unit = row["metric"], row["unit"]
    videos = [video for video in document["videos"] if video["values"].get(name) is not None]
    gate = document.get("gate") or {"rows": []}
    limits = [b["limit"] for b in gate["rows"] if b["metric"] == name and b["kind"] in ("min", "max")]
    key, groups = _groups(videos)
    rows = [DotRow(label, [video["values"][name] for video in group]) for label, group in groups.items()]
    yield dot_plot(f"{name} by {key}", rows, unit=unit, limits=limits)
    if row.get("baseline") is not None:
        bars = [_bar("baseline", row["baseline"]), _bar("this run", row["estimate"])]
        yield bar_plot(f"{name}, mean", bars, unit=unit, limits=limits)
    numbers = {key for video in videos for key in video["settings"]}
    for setting in sorted(numbers):
        found = [video for video in videos if setting in video["settings"]]
        x = sorted({video["settings"][setting] for video in found})
        if len(x) > 1:
            line = _line(name, [[v for v in found if v["settings"][setting] == value] for value in x])
            yield line_plot(f"{name} by {setting}", x, [line], x_label=setting, y_label=unit or name)


def _groups(videos: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, list[Mapping[str, Any]]]]:
    """What the rows of a dot plot are, and the videos of each."""
    for key in ("person", "seed"):
        labels = [video[key] for video in videos]
        if None not in labels and 1 < len(set(labels)) <= _MOST_ROWS:
            groups: dict[str, list[Mapping[str, Any]]] = {}
            for video in sorted(videos, key=lambda video: video[key]):
                groups.setdefault(f"{key} {video[key]}" if key == "seed" else video[key], []).append(video)
            return key, groups
    return "video", {"all videos": list(videos)}


def _bar(name: str, found: Mapping[str, Any]) -> Bar:
    return Bar(name, found["mean"], found["ci_low"], found["ci_high"])


def _line(name: str, groups: Sequence[Sequence[Mapping[str, Any]]]) -> Line:
    found = [estimate([v["values"][name] for v in group], [v["person"] for v in group]) for group in groups]
    return Line(name, [f.mean for f in found], [f.ci_low for f in found], [f.ci_high for f in found])


def _videos(document: Mapping[str, Any]) -> str:
    names = [row["metric"] for row in document["metrics"]]
    rows = [
        tuple(
            map(
                _text,
                (v["case"], v["person"] or "", v["seed"], *(_number(v["values"].get(n)) for n in names)),
            )
        )
        for v in document["videos"]
    ]
    heads = ("video", "person", "seed", *names)
    table = _table(heads, rows, numeric=tuple(range(2, len(heads))))
    return f"<h2>Every video</h2>\n<details><summary>{len(rows)} rows</summary>\n{table}</details>"


def _provenance(document: Mapping[str, Any]) -> str:
    parts = []
    for key in ("settings", "machine", "versions"):
        block = document.get(key)
        if block:
            parts.append(f"<h2>{key.capitalize()}</h2>\n{_definitions(_flat(block))}")
    return "\n".join(parts)


def _flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(map(str, value))
        elif name.endswith("_bytes") and isinstance(value, int):
            flat[name.removesuffix("_bytes")] = f"{value / _GIB:.1f} GiB"
        else:
            flat[name] = value
    return flat


def _raw(document: Mapping[str, Any]) -> str:
    # Inside <script> no entity is read, so what could end the element is written as JSON's own escapes.
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (
        '<p class="soft">The numbers stand in this page as JSON, in the element with the id '
        f'"evaluation".</p>\n<script type="application/json" id="evaluation">{text}</script>'
    )


def _definitions(facts: Mapping[str, Any]) -> str:
    rows = (f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items() if v not in (None, "", {}))
    return f"<dl>{''.join(rows)}</dl>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int]) -> str:
    """Cells are markup already; heads are text."""

    def kind(index: int) -> str:
        return ' class="n"' if index in numeric else ""

    head = "".join(f'<th scope="col"{kind(i)}>{_text(name)}</th>' for i, name in enumerate(heads))
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind(i)}>{cell}</td>' for i, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _number(value: Any, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"


def _interval(found: Mapping[str, Any] | None) -> str:
    if not found or found["ci_low"] is None or found["ci_high"] is None:
        return ""
    return f"{found['ci_low']:.4g} … {found['ci_high']:.4g}"


def _text(value: object) -> str:
    """Escaped for HTML, also inside quotes; control characters and lone surrogates become spaces."""
    text = "" if value is None else str(value)
    return escape("".join(c if c.isprintable() else " " for c in text))
