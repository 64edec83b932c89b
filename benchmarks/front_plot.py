"""Draw the front of a search for a plan: closeness to the exact video over the work that is left.

    python -m proteus_deploy.benchmarks.front_plot TUNE.json --output FILE.png

TUNE.json is what `proteus-deploy tune --json` wrote.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from proteus_deploy.benchmarks.canvas import Canvas
from proteus_deploy.benchmarks.plot_command import write_plot

__all__ = ["front_plot"]

_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 44, 96
_FRONT, _CHOSEN, _OTHER = 0, 5, 6  # series of the canvas
_TICK_DB = 5.0


def front_plot(document: Mapping[str, Any]) -> Canvas:
    """The trials of a tuning document but the exact one, whose PSNR has no bound. The budget's is dashed."""
    trials = [trial for trial in document["trials"] if trial["work"] < 1]
    front = [trial for trial in trials if trial["name"] in document["front"]]
    front.sort(key=lambda trial: trial["work"])
    described = "PSNR in dB over the share of rows: " + "; ".join(
        f"{trial['name']} {trial['means']['psnr']:.1f} at {trial['work']:.2f}" for trial in front
    )
    canvas = Canvas("Closeness to the exact video by the work that is left", described, _WIDTH, _HEIGHT)
    psnr = [trial["means"]["psnr"] for trial in trials]
    lowest = _TICK_DB * math.floor(min(psnr) / _TICK_DB)
    highest = _TICK_DB * math.ceil(max(psnr) / _TICK_DB)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(trial: Mapping[str, Any]) -> tuple[float, float]:
        up = (trial["means"]["psnr"] - lowest) / (highest - lowest)
        return _LEFT + trial["work"] * (right - _LEFT), bottom - up * (bottom - _TOP)

    _axes(canvas, lowest, highest)
    for bound in document["settings"]["bounds"]:
        metric, *_, value = bound.split()
        if metric == "psnr":
            height = place({"work": 0, "means": {"psnr": float(value)}})[1]
            canvas.line(((_LEFT, height), (right, height)), "limit", dashed=True)
    if len(front) > 1:
        canvas.line([place(trial) for trial in front], _FRONT)
    for trial in trials:
        chosen = trial["name"] == document["chosen"]
        series = _CHOSEN if chosen else _FRONT if trial in front else _OTHER
        canvas.marker(*place(trial), series, trial["name"])
    x = float(_LEFT)
    for series, words in ((_FRONT, "front"), (_CHOSEN, f"chosen: {document['chosen']}"), (_OTHER, "others")):
        canvas.marker(x, _HEIGHT - 22, series)
        canvas.text(x + 10, _HEIGHT - 18, words)
        x += 40 + 6.4 * len(words)
    return canvas


def _axes(canvas: Canvas, lowest: float, highest: float) -> None:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for index in range(round((highest - lowest) / _TICK_DB) + 1):
        y = bottom - index * _TICK_DB / (highest - lowest) * (bottom - _TOP)
        canvas.line(((_LEFT, y), (right, y)), "grid")
        canvas.text(_LEFT - 6, y + 4, f"{lowest + index * _TICK_DB:.0f} dB", "end")
    for tenths in range(0, 11, 2):
        x = _LEFT + tenths / 10 * (right - _LEFT)
        canvas.text(x, bottom + 17, f"{10 * tenths}%", "middle")
    canvas.text((_LEFT + right) / 2, bottom + 38, "rows of the denoiser, of the exact loop's", "middle")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture. Returns 0."""
    return write_plot(front_plot, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
