"""One page about one adapter: what it gained, how training went, videos before and after."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from proteus_deploy._files import atomic_file
from proteus_deploy.evaluate.plots import Line, line_plot
from proteus_deploy.evaluate.report_style import STYLE

__all__ = ["write_report"]

_REASONS = {
    "all steps": "every step was taken",
    "reward turned": "the reward of held-out videos no longer rose",
    "motion fell": "held-out videos moved too little",
}
_LOSSES = {"identity_loss": "identity: 1 - cosine", "semantic_loss": "semantics: KL of the frames' scores"}
_REWARD = (
    "The identity reward is the mean cosine with the photo by the recogniser that was trained against. It is "
    "no measure of likeness: for that, make videos and take face_sim_arc of <code>proteus-deploy evaluate"
    "</code>, which is by another recogniser."
)
_BELOW = "Held-out prompts: each video of the frozen model, and below it the same with the adapter."


def write_report(
    file: Path, document: Mapping[str, Any], log: Sequence[Mapping[str, Any]], preview: Path
) -> None:
    """document: of an `Outcome`, with machine and versions. log: lines of log.jsonl. preview: a PNG."""
    frozen, best = document["frozen"], document["best"]
    facts = {
        "identity reward, held-out videos": f"{frozen['reward']:.3f} -> {best['reward']:.3f}",
        "motion, pixels a frame at 480 rows": f"{frozen['motion']:.3f} -> {best['motion']:.3f}",
        "best after": f"{best['step']} of {document['steps']} steps",
        "stopped because": _REASONS[document["stopped"]],
        "seconds": f"{document['seconds']:.0f}",
        "adapter": document["adapter"]["hash"],
        "checkpoint": document["adapter"]["base"],
    }
    rest = {key: document[key] for key in ("settings", "machine", "versions") if key in document}
    parts = [
        f"<h1>{_text(document.get('name', 'Adapter'))}</h1>",
        _definitions(facts),
        f'<p class="soft">{_REWARD}</p>',
        "<h2>Held-out videos over training</h2>",
        f'<div class="plots">{_evaluations(document["evaluations"])}</div>',
        "<h2>Losses</h2>",
        f'<div class="plots">{_losses(log)}</div>',
        "<h2>Before and after</h2>",
        f"<figure>{_picture(preview)}<figcaption>{_BELOW}</figcaption></figure>",
        *(f"<h2>{key.capitalize()}</h2>{_definitions(value)}" for key, value in rest.items()),
    ]
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width='
        f'device-width,initial-scale=1"><title>{_text(document.get("name", "Adapter"))}</title>'
        f"<style>{STYLE}</style>"
    )
    with atomic_file(file) as new:
        new.write_text(head + "\n".join(parts) + "</html>\n", encoding="utf-8")


def _evaluations(found: Sequence[Mapping[str, Any]]) -> str:
    steps = [one["step"] for one in found]
    reward = Line("reward", [one["reward"] for one in found])
    motion = Line("motion", [one["motion"] for one in found])
    return line_plot(
        "Identity reward", steps, [reward], x_label="steps", y_label="cosine with the photo"
    ) + line_plot("Motion", steps, [motion], x_label="steps", y_label="pixels a frame")


def _losses(log: Sequence[Mapping[str, Any]]) -> str:
    plots = ""
    for key, title in _LOSSES.items():
        lines = [line for line in log if key in line]
        if lines:
            losses = Line(title, [line[key] for line in lines])
            steps = [line["step"] for line in lines]
            plots += line_plot(title, steps, [losses], x_label="steps", y_label="loss")
    return plots


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="Frames of held-out videos, before and after">'


def _definitions(facts: Mapping[str, Any]) -> str:
    rows = (f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _text(value: object) -> str:
    return escape("".join(c if c.isprintable() else " " for c in str(value)))
