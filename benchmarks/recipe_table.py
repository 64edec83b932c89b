"""Table of the recipes, from what quantised_recipes.py wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proteus_deploy.benchmarks.recipe_trials import PLAIN

__all__ = ["recipe_table"]

HEADERS = (
    "recipe",
    "backend",
    "weights",
    "error",
    "error, parity",
    "step, ms",
    "over ONNX Runtime fp32",
    "over eager fp32",
    "PSNR, dB",
    "FaceSim",
    "motion",
)
_STATES = {"not measured": "not measured", "failed": "FAILED"}


def recipe_table(document: Mapping[str, Any]) -> str:
    """Markdown: a row for each recipe and backend, reasons below, then what it was measured with.

    FaceSim: change of the mean against the exact videos. motion: the same, as a share of theirs.
    """
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    lines += [f"| {' | '.join(_cells(row, document))} |" for row in document["rows"]]
    parity = document.get("parity") or {"rows": []}
    reasons = dict.fromkeys(
        f"- `{row['recipe']}` on {row['backend']}, {where}: {_STATES[row['status']]}. {row['reason']}"
        for rows, where in ((document["rows"], "tiny model"), (parity["rows"], "parity checkpoint"))
        for row in rows
        if row["status"] != "ok"
    )
    if reasons:
        lines += ["", *reasons]
    return "\n".join([*lines, "", _conditions(document)])


def _cells(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    share = document["bytes"].get(row["recipe"], {}).get("share_of_fp32")
    latency = row.get("latency_ms")
    return [
        f"`{row['recipe']}`",
        row["backend"],
        "" if share is None else f"{share:.0%}",
        _format(row.get("relative_error"), ".1e"),
        _format(_parity_error(row, document), ".1e"),
        "" if latency is None else f"{latency['median']:.1f}",
        _format(row.get("speedup_vs_onnxruntime_fp32"), ".2f", "x"),
        _format(row.get("speedup_vs_eager_fp32"), ".2f", "x"),
        *_video_cells(row, document),
    ]


def _parity_error(row: Mapping[str, Any], document: Mapping[str, Any]) -> float | None:
    rows = (document.get("parity") or {"rows": []})["rows"]
    own = (row["recipe"], row["backend"])
    found: Mapping[str, Any] = next((one for one in rows if (one["recipe"], one["backend"]) == own), {})
    error: float | None = found.get("relative_error")
    return error


def _video_cells(row: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    if (row["recipe"], row["backend"]) == (PLAIN, "eager"):
        return ["the exact one", "", ""]
    means, exact = row.get("video", {}).get("means", {}), document.get("exact") or {}
    likeness = _difference(means, exact, "face_sim_arc")
    motion = _difference(means, exact, "motion_background")
    if motion is not None:
        motion = motion / exact["motion_background"] if exact["motion_background"] else None
    return [_format(means.get("psnr"), ".1f"), _format(likeness, "+.3f"), _format(motion, "+.1%")]


def _difference(means: Mapping[str, float], exact: Mapping[str, float], name: str) -> float | None:
    return means[name] - exact[name] if name in means and name in exact else None


def _format(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _conditions(document: Mapping[str, Any]) -> str:
    settings, machine = document["settings"], document["machine"]
    extensions = f" ({', '.join(machine['extensions'])})" if machine["extensions"] else ""
    packages = [
        f"{name} {document['versions'][name]}"
        for name in ("torch", "onnxruntime", "openvino")
        if name in document["versions"]
    ]
    films = f"{len(settings['people'])} held-out people on {' and '.join(settings['video_backends'])}"
    return (
        f"Tiny model, float32 where nothing is quantised; videos of {films}, "
        f"{settings['num_inference_steps']} steps; step times: medians of {settings['rounds']} interleaved "
        "rounds; "
        f"{machine['cpu']}, {machine['cores']} cores{extensions}, {settings['threads']} threads; "
        f"{', '.join(packages)}; commit {document['commit'][:12]}."
    )
