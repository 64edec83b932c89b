"""What a bench document says in text: tables for the terminal, Markdown and the README, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file
from proteus_deploy.benchmarks.whole_request import STAGES

__all__ = [
    "HEADERS",
    "REQUEST_HEADERS",
    "conditions",
    "markdown",
    "readme_table",
    "request_table",
    "table",
    "to_csv",
    "write_text",
]

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
REQUEST_HEADERS = (
    "case",
    "request s",
    "first frame s",
    *(f"{name.replace('_', ' ')} s" for name in STAGES),
    "× published fp32",
    "× published bf16",
    "PSNR dB",
    "status",
)
_README_HEADERS = (
    "candidate",
    "loop, s",
    "over the published form in bf16",
    "in fp32",
    "step, ms",
    "share of the floor",
    "error",
)


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """A row of text for each candidate, under `HEADERS`; what wasn't measured is empty."""
    return [_line(row) for row in document["rows"]]


def _line(row: Mapping[str, Any]) -> list[str]:
    case = _case(row)
    if row["status"] != "ok":
        return [case, *[""] * (len(HEADERS) - 2), f"{row['status']}: {row['reason']}"]
    loop, step = row["latency_ms"], row["step_ms"]
    memory = row.get("peak_memory_bytes")
    return [
        case,
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


def _case(row: Mapping[str, Any]) -> str:
    """With the size it was measured at, where the document has several."""
    return f"{row['case']} at {row['curve']['value']}" if "curve" in row else str(row["case"])


def request_table(document: Mapping[str, Any]) -> list[list[str]]:
    """Whole requests under `REQUEST_HEADERS`: the candidates that made one, or tried."""
    return [_request_line(row) for row in document["rows"] if "request_ms" in row or "request_reason" in row]


def _request_line(row: Mapping[str, Any]) -> list[str]:
    if "request_ms" not in row:
        return [row["case"], *[""] * (len(REQUEST_HEADERS) - 2), f"failed: {row['request_reason']}"]
    times = [row["request_ms"], row["first_frame_ms"], *(row["stages_ms"][name] for name in STAGES)]
    return [
        row["case"],
        *(f"{time['median'] / 1e3:.2f}" for time in times),
        _number(row["request_speedup_vs_published_fp32"], ".2f"),
        _number(row["request_speedup_vs_published_bf16"], ".2f"),
        _number(row["psnr_db"], ".1f"),
        "ok",
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def conditions(document: Mapping[str, Any]) -> str:
    """One sentence of where and how the figures were taken."""
    settings = document["settings"]
    video = settings["video"]
    size = f"{video['num_frames']} frames at {video['height']}x{video['width']}"
    if "scale" in settings:
        size = f"several sizes, by {settings['scale']['x_label']}"
    return (
        f"{settings['size']}: {size}, {settings['steps']} steps under guidance, medians of "
        f"{settings['rounds']} interleaved rounds; {_where(document)}, "
        f"torch {document['versions']['torch']}, commit {str(document['commit'])[:12]}"
    )


def _where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    if document["settings"]["device"] != "cpu":
        return str(machine["gpu"])
    extensions = f" ({', '.join(machine['extensions'])})" if machine.get("extensions") else ""
    return f"{machine['cpu']}, {machine['cores']} cores{extensions}"


def markdown(document: Mapping[str, Any]) -> str:
    """The tables and their conditions in Markdown."""
    lines = _markdown_table(HEADERS, table(document))
    if requests := request_table(document):
        lines += ["", *_markdown_table(REQUEST_HEADERS, requests)]
    return "\n".join([*lines, "", conditions(document), ""])


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def readme_table(document: Mapping[str, Any]) -> str:
    """What the README shows of a result file, between its markers: the rows that ran, and one line below.

    The line has machine, threads, versions, commit, steps and rounds. Ends without a newline.
    """
    rows = [
        [
            f"`{row['case']}`",
            f"{row['latency_ms']['median'] / 1e3:.1f}",
            _times(row.get("speedup_vs_published_bf16")),
            _times(row.get("speedup_vs_published_fp32")),
            f"{row['step_ms']['median']:.0f}",
            _number(row.get("share_of_floor"), ".0%"),
            _number(row.get("relative_error"), ".1e"),
        ]
        for row in document["rows"]
        if row["status"] == "ok"
    ]
    settings, versions = document["settings"], document["versions"]
    video = settings["video"]
    named = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "triton")
    packages = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    below = (
        f"`{settings['size']}`, {video['num_frames']} frames at {video['height']}x{video['width']}, "
        f"{settings['steps']} steps under guidance, medians of {settings['rounds']} interleaved rounds; "
        f"{_where(document)}, {settings['threads']} threads; {packages}; "
        f"commit {str(document['commit'])[:12]}."
    )
    return "\n".join([*_markdown_table(_README_HEADERS, rows), "", below])


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


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


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
