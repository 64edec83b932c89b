"""What a search for a plan found: the result document and a page with the front."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from proteus_deploy._files import without_nan
from proteus_deploy.evaluate.plots import Points, scatter_plot
from proteus_deploy.evaluate.report_style import STYLE

if TYPE_CHECKING:
    from proteus_deploy.benchmarks.plan_trials import Trial
    from proteus_deploy.benchmarks.tuning import Tuning

__all__ = ["HEADERS", "page", "row", "tuning_document"]

HEADERS = ("plan", "work", "psnr dB", "likeness", "motion", "budget")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def row(trial: Trial) -> list[str]:
    """A trial under `HEADERS`."""
    means = trial.means
    shown = [
        "" if means.get(name) is None else f"{means[name]:{form}}"
        for name, form in (("psnr", ".1f"), ("face_sim_arc", ".3f"), ("motion_background", ".2f"))
    ]
    failed = ", ".join(one.metric for one in trial.gate.rows if not one.passed)
    return [trial.name, f"{trial.work:.2f}", *shown, "passed" if trial.gate.passed else f"broken: {failed}"]


def tuning_document(tuning: Tuning, about: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of all trials, the front and the choice. about: machine, versions, commit, settings."""
    return {
        "what": "plans tried for a model, by the share of denoiser rows that they compute; checks: those "
        "tried again on cases that the search had not seen",
        **about,
        "chosen": tuning.chosen.name,
        "front": [trial.name for trial in tuning.front()],
        "trials": [trial.to_json() for trial in tuning.trials],
        "checks": [trial.to_json() for trial in tuning.checks],
    }


def page(tuning: Tuning, document: Mapping[str, Any], psnr_bound: float | None = None) -> str:
    """A self-contained HTML page. psnr_bound: drawn as a line, where the budget has one."""
    front = tuning.front()
    kinds = [
        Points(
            "front",
            [(trial.name, trial.work, trial.means["psnr"]) for trial in front if trial.name != "exact"],
            joined=True,
        ),
        Points("chosen", [(tuning.chosen.name, tuning.chosen.work, tuning.chosen.means["psnr"])]),
        Points(
            "others",
            [
                (trial.name, trial.work, trial.means["psnr"])
                for trial in tuning.trials
                if trial not in front and trial is not tuning.chosen
            ],
        ),
    ]
    plot = scatter_plot(
        "Closeness to the exact video by the work that is left",
        [kind for kind in kinds if kind.points],
        x_label="share of the exact loop's rows",
        y_label="PSNR in dB",
        limits=[] if psnr_bound is None else [psnr_bound],
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row(trial)) + "</tr>"
        for trial in sorted(tuning.trials, key=lambda trial: trial.work)
    )
    raw = escape(json.dumps(without_nan(dict(document)), indent=1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plans</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body><h1>Plans for {escape(str(document['settings']['model']))}</h1>"
        f"<p>Chosen: <b>{escape(tuning.chosen.name)}</b>, {tuning.chosen.work:.0%} of the exact loop's rows, "
        f"within the budget “{escape(str(document['settings']['budget']))}”.</p>{plot}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<details><summary>All numbers</summary><pre>{raw}</pre></details></body></html>\n"
    )
