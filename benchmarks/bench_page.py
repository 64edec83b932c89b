"""A bench document as a page to look at, and its plots as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file, without_nan
from proteus_deploy.benchmarks.bench_plots import plots
from proteus_deploy.benchmarks.bench_report import HEADERS, REQUEST_HEADERS, conditions, request_table, table
from proteus_deploy.evaluate.report_style import STYLE

__all__ = ["page", "write_plots"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(document: Mapping[str, Any]) -> str:
    """Self-contained HTML: conditions, tables, every plot that there are figures for, the raw document."""
    document = without_nan(document)
    parts = [
        f"<h1>Benchmark of {escape(document['settings']['size'])}</h1>",
        f"<p>{escape(conditions(document))}</p>",
        f"<p class='soft'>{escape(document['what'])}</p>",
        _html_table(HEADERS, table(document)),
    ]
    if requests := request_table(document):
        parts.append(_html_table(REQUEST_HEADERS, requests))
        parts.append(f"<p class='soft'>{escape(document['settings']['identity'])}</p>")
    parts += [f"<div class='plots'>{canvas.svg()}</div>" for canvas in plots(document).values()]
    raw = escape(json.dumps(document, indent=1))
    parts.append(f"<details><summary>All numbers</summary><pre>{raw}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmark</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def write_plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every plot as folder/NAME.png; the files."""
    files = []
    for name, canvas in plots(document).items():
        file = folder / f"{name}.png"
        with atomic_file(file) as temporary:
            temporary.write_bytes(canvas.png())
        files.append(file)
    return files


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
