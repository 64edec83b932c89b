"""What commands print on standard output: aligned tables and one JSON document."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from proteus_deploy._files import without_nan

_GAP = "  "


def _cell(value: object) -> str:
    """One line of printable text; control characters of foreign names are shown, not obeyed."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out `rows` under `headers`; columns that hold only numbers are aligned to the right.

    None is an empty cell. Raises ValueError for a row of another length than `headers`.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {list(row)!r}")
    cells = [[_cell(value) for value in line] for line in (headers, *rows)]
    widths = [max(_width(line[i]) for line in cells) for i in range(len(headers))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(headers))
    ]

    def lay_out(line: Sequence[str]) -> str:
        padded = []
        for text, width, right in zip(line, widths, numeric, strict=True):
            padding = " " * (width - _width(text))
            padded.append(padding + text if right else text + padding)
        return _GAP.join(padded).rstrip()

    rule = _GAP.join("-" * width for width in widths)
    return "\n".join([lay_out(cells[0]), rule, *(lay_out(line) for line in cells[1:])])


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print `format_table` of the same arguments."""
    print(format_table(headers, rows))


def print_json(document: Any) -> None:
    """Print one indented ASCII JSON document; NaN and infinities become null."""
    print(json.dumps(without_nan(document), indent=2, allow_nan=False))
