"""What a search for a mixture of formats found: the result document, its table, and a page with plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import without_nan
from proteus_deploy.benchmarks.sensitivity_plot import sensitivity_plot
from proteus_deploy.evaluate.plots import Points, scatter_plot
from proteus_deploy.evaluate.report_style import STYLE

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.precision_search import PrecisionTuning

__all__ = ["HEADERS", "page", "precision_document", "row", "rows"]

HEADERS = ("denoiser", "weights", "of exact", "error", "predicted", "psnr dB", "likeness", "motion", "budget")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MEASURES = (("psnr", ".1f"), ("face_sim_arc", ".3f"), ("motion_background", ".2f"))

Trial = Mapping[str, Any]


def precision_document(tuning: PrecisionTuning, about: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of sensitivities, path, trials and the choice. about: machine, versions, commit, settings."""
    chosen = tuning.chosen.recipe
    index = 0 if chosen is None else int(tuning.chosen.name.split()[1])
    kinds = tuning.path[index].kinds
    return {
        "what": "formats tried for the layers of a denoiser: the error that each causes alone, assignments "
        "from careful to bold with their videos, ready recipes (their denoiser) beside them; checks: those "
        "tried again on cases that the search had not seen",
        **about,
        "chosen": tuning.chosen.name,
        "kinds": dict(kinds),
        "counts": dict(sorted(Counter(kinds.values()).items())),
        "recipe": None if chosen is None else chosen.hash,
        "simulated": list(tuning.table.simulated),
        "sensitivities": tuning.table.to_json(),
        "path": [
            {
                "cost": one.cost,
                "error": one.error_squared**0.5,
                "weight_bytes": tuning.table.weight_bytes(one.kinds),
            }
            for one in tuning.path
        ],
        "trials": [trial.to_json() for trial in tuning.trials],
        "ready": [trial.to_json() for trial in tuning.ready],
        "checks": [trial.to_json() for trial in tuning.checks],
    }


def row(trial: Trial, exact_bytes: int) -> list[str]:
    """A trial of a document under `HEADERS`."""
    means, predicted = trial["means"], trial["predicted_error"]
    shown = ["" if means.get(name) is None else f"{means[name]:{form}}" for name, form in _MEASURES]
    failed = ", ".join(dict.fromkeys(cells[0] for cells in trial["gate"] if "FAILED" in cells))
    return [
        trial["name"],
        f"{trial['weight_bytes'] / 1e6:.2f} MB",
        f"{trial['weight_bytes'] / exact_bytes:.1%}",
        f"{trial['measured_error']:.1e}",
        "" if predicted is None else f"{predicted:.1e}",
        *shown,
        "passed" if trial["passed"] else f"broken: {failed}",
    ]


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Of the trials and the ready recipes, the largest first."""
    exact = document["trials"][0]["weight_bytes"]
    trials = sorted((*document["trials"], *document["ready"]), key=lambda one: -one["weight_bytes"])
    return [row(trial, exact) for trial in trials]


def page(document: Mapping[str, Any], psnr_bound: float | None = None) -> str:
    """A self-contained HTML page of a document. psnr_bound: drawn as a line, where the budget has one."""
    settings, chosen = document["settings"], document["chosen"]
    exact = document["trials"][0]["weight_bytes"]
    taken = next(trial for trial in document["trials"] if trial["name"] == chosen)
    counts = ", ".join(f"{count} {kind}" for kind, count in document["counts"].items())
    simulated = document["simulated"]
    said = (
        f"<p>Simulated, since PyTorch has no such products here: {escape(', '.join(simulated))}.</p>"
        if simulated
        else ""
    )
    raw = escape(json.dumps(without_nan(dict(document)), indent=1))
    again = (
        "<h2>Again, on cases that the search had not seen</h2>"
        + _table([row(trial, exact) for trial in document["checks"]])
        if document["checks"]
        else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Mixed precision</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body><h1>Mixed precision for {escape(str(settings['model']))}</h1>"
        f"<p>Chosen: <b>{escape(chosen)}</b> ({escape(counts)}), {taken['weight_bytes'] / exact:.1%} of the "
        f"bytes of the denoiser's Linear layers, within the budget “{escape(str(settings['budget']))}”.</p>"
        f"{said}"
        f'<h2>Sensitivity</h2><div class="plots">{sensitivity_plot(document).svg()}</div>'
        f'<h2>Bytes against closeness</h2><div class="plots">{_psnr_plot(document, psnr_bound)}'
        f"{_error_plot(document)}</div>"
        f"{_table(rows(document))}{again}"
        f"<details><summary>All numbers</summary><pre>{raw}</pre></details></body></html>\n"
    )


def _table(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in one) + "</tr>" for one in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _psnr_plot(document: Mapping[str, Any], bound: float | None) -> str:
    """Exact videos have no PSNR, so the exact trial is left out."""

    def point(trial: Trial) -> tuple[str, float, float]:
        return trial["name"], trial["weight_bytes"] / 1e6, trial["means"]["psnr"]

    mixed = [trial for trial in document["trials"] if trial["measured_error"] > 0]
    kinds = [
        Points("mixed", [point(trial) for trial in mixed], joined=True),
        Points("ready recipes", [point(trial) for trial in document["ready"]]),
        Points("chosen", [point(trial) for trial in mixed if trial["name"] == document["chosen"]]),
    ]
    return scatter_plot(
        "PSNR of the videos by bytes of weights",
        [kind for kind in kinds if kind.points],
        x_label="MB of the denoiser's Linear layers",
        y_label="PSNR in dB",
        limits=[] if bound is None else [bound],
    )


def _error_plot(document: Mapping[str, Any]) -> str:
    """Errors as decibels that the velocity stands above them: a logarithm, and more is better."""
    other = document["trials"][0]["weight_bytes"] - document["path"][0]["weight_bytes"]  # never quantised

    def decibels(error: float) -> float:
        return -20 * math.log10(error)

    path = [one for one in document["path"] if one["error"] > 0]
    predicted = [("predicted", (one["weight_bytes"] + other) / 1e6, decibels(one["error"])) for one in path]

    def points(trials: Sequence[Trial]) -> list[tuple[str, float, float]]:
        return [
            (trial["name"], trial["weight_bytes"] / 1e6, decibels(trial["measured_error"]))
            for trial in trials
            if trial["measured_error"] > 0
        ]

    kinds = [
        Points("predicted", predicted, joined=True),
        Points("ready recipes", points(document["ready"])),
        Points("measured", points(document["trials"])),
    ]
    return scatter_plot(
        "Velocity above its error, dB, by bytes of weights",
        [kind for kind in kinds if kind.points],
        x_label="MB of the denoiser's Linear layers",
        y_label="dB",
    )
