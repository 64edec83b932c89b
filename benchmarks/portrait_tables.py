"""The tables and plots of docs/portrait.md, from the files that the benchmarks of portraits write.

    python -m proteus_deploy.benchmarks.portrait_tables benchmarks/results/portrait/policies.json
    python -m proteus_deploy.benchmarks.portrait_tables FILE --plot docs/images/portrait-budgets.svg

Each file says by its "what" which table it makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file
from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.plots import Line, line_plot
from proteus_deploy.weights import read_json

__all__ = ["main", "table"]

_QUALITY, _DECODE, _MEMORY = "portraits of", "seconds of", "images at once"
_PLOTTED = ("adsa", "sink-window", "random", "uniform")


def table(document: Mapping[str, Any]) -> str:
    """Markdown: the table, and below it what it was measured with."""
    return "\n".join([*_of(document)(document), "", _conditions(document)])


def _of(document: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], list[str]]:
    tables = {_QUALITY: _quality_rows, _DECODE: _decode_rows, _MEMORY: _memory_rows}
    for start, rows in tables.items():
        if str(document.get("what")).startswith(start):
            return rows
    raise InputError(f"the file is of {document.get('what')!r}; there are tables of {', '.join(tables)} …")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _quality_rows(document: Mapping[str, Any]) -> list[str]:
    header = ["cache", "slots", "looks right", "clothes and place right", "text", "distance"]
    header += ["same token, forced", "PSNR to dense"]
    rows = []
    for row in document["rows"]:
        cells = [row["name"], f"{row['share_of_dense_slots']:.0%}"]
        cells += [_share(row, "identity"), _share(row, "scene"), _score(row, "text")]
        distance = row["distance"]
        shown = f"{distance['value']:.3f}"
        if "of_dense" in distance:
            shown += f" ({_ratio(distance, 'of_dense')})"
        cells.append(shown)
        if "psnr" in row:
            cells += [f"{row['agreement_forced']['mean']:.1%}", f"{row['psnr']['mean']:.1f} dB"]
        else:
            cells += ["", ""]
        rows.append(cells)
    drawn = document["drawn_photos"]
    rows.append(
        [
            "drawn photos",
            "",
            f"{drawn['identity']['mean']:.1%}",
            f"{drawn['scene']['mean']:.1%}",
            f"{drawn['text']['mean']:.2f}",
            f"{drawn['distance']:.3f}",
            "",
            "",
        ]
    )
    return _markdown(header, rows)


def _share(row: Mapping[str, Any], name: str) -> str:
    shown = f"{row[name]['mean']:.1%}"
    if "minus_dense" in row:
        less = row["minus_dense"][name]
        shown += f" ({100 * less['mean']:+.1f}, {100 * less['ci_low']:+.1f} to {100 * less['ci_high']:+.1f})"
    return shown


def _score(row: Mapping[str, Any], name: str) -> str:
    shown = f"{row[name]['mean']:.2f}"
    if "minus_dense" in row:
        less = row["minus_dense"][name]
        shown += f" ({less['mean']:+.2f}, {less['ci_low']:+.2f} to {less['ci_high']:+.2f})"
    return shown


def _ratio(distance: Mapping[str, float], name: str) -> str:
    return f"{distance[name]:.2f}x, {distance[name + '_low']:.2f} to {distance[name + '_high']:.2f}"


def _decode_rows(document: Mapping[str, Any]) -> list[str]:
    header = ["cache", "seconds", "over dense", "in the last quarter", "keys and values", "beside them"]
    rows = [
        [
            row["cache"],
            f"{row['seconds']['median']:.1f} ({row['seconds']['p20']:.1f} to {row['seconds']['p80']:.1f})",
            f"{row['faster']:.2f}x",
            f"{row['faster_at_the_end']:.2f}x",
            f"{row['cache_bytes'] / 2**20:.1f} MiB, {row['share_of_dense_bytes']:.1%}",
            f"{row['bookkeeping_bytes'] / 2**20:.2f} MiB",
        ]
        for row in document["rows"]
    ]
    return _markdown(header, rows)


def _memory_rows(document: Mapping[str, Any]) -> list[str]:
    header = ["cache", "images at once", "images an hour, by batch"]
    rows = []
    for name, row in document["rows"].items():
        timed = {one["images"]: one["images_an_hour"] for one in row["tried"] if "images_an_hour" in one}
        shown = ", ".join(f"{batch}: {rate:.0f}" for batch, rate in sorted(timed.items()))
        rows.append([name, str(row["images"]), shown])
    return _markdown(header, rows)


def _conditions(document: Mapping[str, Any]) -> str:
    settings, machine = document["settings"], document["machine"]
    if "people" in settings:
        sampling = settings["sampling"]
        count = len(settings["people"]) * settings["captions_of_each"] * settings["portraits_of_each"]
        said = (
            f"{count} portraits a line: {len(settings['people'])} people whom the model never saw, "
            f"{settings['captions_of_each']} captions each, {settings['portraits_of_each']} seeds; guidance "
            f"{sampling['guidance_scale']:g}, temperature {sampling['temperature']:g}. In brackets "
            "differences from dense and their 95% intervals over people"
        )
    elif "limit_bytes" in settings:
        said = f"{settings['size']}, {settings['limit_bytes'] / 2**30:g} GiB, {settings['dtype']}, guidance"
    else:
        said = (
            f"{settings['size']}, {settings['images']} image{'s' * (settings['images'] > 1)} of 1,024 tokens "
            f"with guidance, weights in {settings['dtype']}, cache in "
            f"{settings.get('cache_dtype', settings['dtype'])}, medians of {settings['rounds']} rounds"
        )
        if settings.get("lengths"):
            said += f", each of steps at {settings['lengths']} lengths"
    return (
        f"{said}; {machine['cpu']}, {machine['cores']} cores; torch {document['versions']['torch']}; commit "
        f"{document['commit'][:12]}."
    )


def plot(document: Mapping[str, Any]) -> str:
    """SVG: looks over budgets for files of policies, milliseconds over positions for those of decoding."""
    if (
        "rows" in document
        and isinstance(document["rows"], list)
        and "milliseconds_by_position" in document["rows"][0]
    ):
        curves = {row["cache"]: row["milliseconds_by_position"] for row in document["rows"]}
        parts = len(next(iter(curves.values())))
        x = [(part + 0.5) / parts * 1024 for part in range(parts)]
        lines = [Line(name, tuple(curve)) for name, curve in curves.items()]
        return line_plot("A step", x, lines, x_label="position", y_label="milliseconds")
    budgets = sorted({row["cache"]["budget"] for row in document["rows"]})
    found = {(row["cache"]["policy"], row["cache"]["budget"]): row["identity"] for row in document["rows"]}
    dense = found["dense", 1.0]
    lines = []
    for policy in _PLOTTED:
        # At 100% every policy is dense; elsewhere a gap is what wasn't drawn.
        rows = [dense if budget == 1 else found.get((policy, budget)) for budget in budgets]
        mean, low, high = (
            tuple(None if row is None else 100 * row[name] for row in rows)
            for name in ("mean", "ci_low", "ci_high")
        )
        lines.append(Line(policy, mean, low, high))
    x = [100 * budget for budget in budgets]
    return line_plot("Looks that are as written", x, lines, x_label="budget, %", y_label="%")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a result file, or draw its plot."""
    parser = argparse.ArgumentParser(prog="portrait_tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, help="draw instead, an SVG")
    given = parser.parse_args(arguments)
    document = read_json(given.file, error=InputError)
    if given.plot is None:
        print(table(document))
    else:
        with atomic_file(given.plot) as new:
            new.write_text(plot(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
