"""Tables of the published size: what quantised exports and engines cost.

python -m proteus_deploy.benchmarks.real_size_tables FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["exports_table", "load_words", "main", "slices_table"]

_EXPORTS = ("recipe", "file, GB", "peak memory, GB", "seconds")
_SLICES = (
    *("recipe", "layers", "target", "ONNX, GB", "status", "peak, GB", "without mapped files, GB"),
    *("engine, GB", "seconds", "unexplained products"),
)
_GB = 10**9


def exports_table(document: Mapping[str, Any]) -> str:
    """Markdown of a result of real_size_export.py --quantize."""
    rows = [
        [
            f"`{row['recipe']}`",
            _gb(row.get("file_bytes")),
            _gb(row.get("peak_memory_bytes")),
            f"{row['seconds']:.0f}" if row["status"] == "ok" else row["reason"],
        ]
        for row in document["rows"]
    ]
    return "\n".join([*_table(_EXPORTS, rows), "", _conditions(document)])


def slices_table(document: Mapping[str, Any]) -> str:
    """Markdown of a result of real_size_engines.py: slices, then the line through their peaks."""
    whole = document["settings"]["whole_layers"]
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['layers']} of {whole}",
            row["target"],
            _gb(row.get("onnx_bytes")),
            row["status"] if "reason" not in row else f"{row['status']}: {row['reason']}",
            _gb(row.get("peak_memory_bytes")),
            _gb(row.get("peak_anonymous_bytes")),
            _gb(row.get("engine_bytes")),
            "" if row.get("seconds") is None else f"{row['seconds']:.0f}",
            str(len(row["unexplained"])) if "unexplained" in row else "",
        ]
        for row in document["rows"]
    ]
    lines = _table(_SLICES, rows)
    for recipe, peaks in document["extrapolation"].items():
        for peak, words in (
            ("peak_memory_bytes", "peak"),
            ("peak_anonymous_bytes", "peak without mapped files"),
        ):
            if (line := peaks.get(peak)) is not None:
                slices = ", ".join(map(str, line["slices"]))
                text = (
                    f"`{recipe}`, {words}: {_gb(line['fixed_bytes'])} GB + "
                    f"{_gb(line['bytes_per_layer'], 3)} GB × layers, a line through {slices} layers: "
                    f"{_gb(line['bytes'])} GB for all {whole}."
                )
                lines += ["", text]
    return "\n".join([*lines, "", _conditions(document)])


def _conditions(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return (
        f"bf16 where nothing is quantised, width {document['settings']['width']}, made-up weights and "
        f"statistics; {machine['cpu']}, {machine['cores']} cores{load_words(document['rows'])}; "
        f"commit {document['commit'][:12]}."
    )


def load_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """How busy the machine was beside what was measured; "" where no row says. Seconds depend on it."""
    known = sorted(row["load_average"] for row in rows if row.get("load_average") is not None)
    return f" at a load of {known[0]} to {known[-1]}" if known else ""


def _gb(value: int | None, digits: int = 2) -> str:
    return "" if value is None else f"{value / _GB:.{digits}f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a result file."""
    (name,) = sys.argv[1:] if argv is None else argv
    document = json.loads(Path(name).read_text(encoding="utf-8"))
    print(slices_table(document) if "extrapolation" in document else exports_table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
