"""What a bench document looks like: a table for the terminal and for Markdown, CSV, and one page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file, without_nan
from proteus_deploy.evaluate.plots import Bar, bar_plot
from proteus_deploy.evaluate.report_style import STYLE

__all__ = ["HEADERS", "conditions", "markdown", "page", "table", "to_csv", "write_text"]

HEADERS = (
    "case",
    "loop s",
    "p20 to p80",
    "step ms",
    "× published fp32",
    "× published bf16",
    "share of floor",
    "error",
    "memory MiB",
    "cold start s",
    "status",
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """A row of text for each candidate, under `HEADERS`; what wasn't measured is empty."""
    return [_line(row) for row in document["rows"]]


def _line(row: Mapping[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [row["case"], *[""] * (len(HEADERS) - 2), f"{row['status']}: {row['reason']}"]
    loop, step = row["latency_ms"], row["step_ms"]
    memory = row.get("peak_memory_bytes")
    return [
        row["case"],
        f"{loop['median'] / 1e3:.2f}",
        f"{loop['p20'] / 1e3:.2f} to {loop['p80'] / 1e3:.2f}",
        f"{step['median']:.1f}",
        _number(row.get("speedup_vs_published_fp32"), ".2f"),
        _number(row.get("speedup_vs_published_bf16"), ".2f"),
        _number(row.get("share_of_floor"), ".0%"),
        _number(row.get("relative_error"), ".1e"),
        "" if memory is None else f"{memory / (1 << 20):.0f}",
        _number(row.get("cold_start_s"), ".1f"),
        "ok",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def conditions(document: Mapping[str, Any]) -> str:
    """One sentence of where and how the figures were taken."""
    machine, settings = document["machine"], document["settings"]
    video = settings["video"]
    where = machine["gpu"] if settings["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    extensions = f" ({', '.join(machine['extensions'])})" if machine.get("extensions") else ""
    return (
        f"{settings['size']}: {video['num_frames']} frames at {video['height']}x{video['width']}, "
        f"{settings['steps']} steps under guidance, medians of {settings['rounds']} interleaved rounds; "
        f"{where}{extensions if settings['device'] == 'cpu' else ''}, torch {document['versions']['torch']}, "
        f"commit {str(document['commit'])[:12]}"
    )


def markdown(document: Mapping[str, Any]) -> str:
    """The table and its conditions in Markdown."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table(document)]
    return "\n".join([*lines, "", conditions(document), ""])


def to_csv(document: Mapping[str, Any]) -> str:
    """Every field of every row, nested ones as name.inner."""
    rows = [_flat(row) for row in document["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def page(document: Mapping[str, Any]) -> str:
    """A self-contained HTML page: conditions, table, bars of the loops and of the steps, the raw document."""
    document = without_nan(document)
    ok = [row for row in document["rows"] if row["status"] == "ok"]
    parts = [
        f"<h1>Benchmark of {escape(document['settings']['size'])}</h1>",
        f"<p>{escape(conditions(document))}</p>",
        f"<p class='soft'>{escape(document['what'])}</p>",
        _html_table(table(document)),
    ]
    if ok:
        parts.append(bar_plot("A whole loop", _bars(ok, "latency_ms", 1e-3), unit="seconds"))
        floors = sorted({row["floor_ms"] for row in ok if row.get("floor_ms") is not None})
        parts.append(
            bar_plot(
                "One step; dashed: what the machine's products alone would take",
                _bars(ok, "step_ms", 1.0),
                unit="milliseconds",
                limits=floors,
            )
        )
    raw = escape(json.dumps(document, indent=1))
    parts.append(f"<details><summary>All numbers</summary><pre>{raw}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmark</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _bars(rows: Sequence[Mapping[str, Any]], key: str, scale: float) -> list[Bar]:
    return [
        Bar(row["case"], scale * row[key]["median"], scale * row[key]["p20"], scale * row[key]["p80"])
        for row in rows
    ]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
