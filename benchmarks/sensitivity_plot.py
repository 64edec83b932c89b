"""Draw how sensitive each layer of a denoiser is to each format: a heat map of the blocks, one of the rest.

    python -m proteus_deploy.benchmarks.sensitivity_plot TUNE.json --output FILE.png

TUNE.json is what `proteus-deploy tune --quantize --json` wrote. Colours are those of the logarithm of the
error; the formats that the chosen recipe takes have a frame.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from proteus_deploy.benchmarks.canvas import CHARACTER, Canvas
from proteus_deploy.benchmarks.plot_command import write_plot

__all__ = ["sensitivity_plot"]

_WIDTH = 760
_TOP, _LEFT, _RIGHT = 62, 62, 16
_CELL, _ROW, _GAP = 36, 18, 22
_HEADINGS = 34  # of a panel: its format and its columns
_FRAME = 4  # series of the canvas: light blue, seen on light and on dark cells
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
# Kinds of layer in a block, in its order, as the columns call them.
_KINDS = {
    "norm1.linear": "mod1",
    "attn1.to_[qkv]": "q k v",
    "attn1.to_out.0": "out",
    "norm2.linear": "mod2",
    "ff.net.0.proj": "ff 1",
    "ff.net.2": "ff 2",
}
# From light to dark and even in lightness, as in magma (van der Walt and Smith, SciPy 2015), reversed.
_RAMP = ("#FCFDBF", "#FEB078", "#F1605D", "#B63679", "#721F81", "#2D1160")


def sensitivity_plot(document: Mapping[str, Any]) -> Canvas:
    """Of a document that `precision_document` made. Raises ValueError where nothing has an error."""
    table: Mapping[str, Mapping[str, Any]] = document["sensitivities"]
    formats, chosen = document["settings"]["formats"], document["kinds"]
    errors = [one["error"] for kinds in table.values() for one in kinds.values() if one["error"] > 0]
    if not errors:
        raise ValueError("no layer has an error above 0; there is nothing to draw")
    scale = _Scale(min(errors), max(errors))
    blocks = _blocks(table)
    others = [name for name in table if not _BLOCK.fullmatch(name)]
    columns = [kind for kind in _KINDS if any(kind in row for row in blocks.values())]
    per_line = max(1, int((_WIDTH - _LEFT - _RIGHT) // (len(columns) * _CELL + _GAP)))
    lines = math.ceil(len(formats) / per_line)
    panel = _HEADINGS + len(blocks) * _ROW + _GAP
    first_other = _TOP + lines * panel
    height = first_other + 20 + len(others) * _ROW + 14
    canvas = Canvas("Error of a step when one layer alone is quantised", _described(table), _WIDTH, height)
    _legend(canvas, scale)
    for number, kind in enumerate(formats):
        line, place = divmod(number, per_line)
        left: float = _LEFT + place * (len(columns) * _CELL + _GAP)
        top = _TOP + line * panel
        canvas.text(left, top + 12, kind, bold=True)
        for column, name in enumerate(columns):
            canvas.text(left + (column + 0.5) * _CELL, top + 28, _KINDS[name], "middle")
        for row, (index, layers) in enumerate(blocks.items()):
            y = top + _HEADINGS + row * _ROW
            if place == 0:
                canvas.text(left - 6, y + 13, f"block {index}", "end")
            for column, name in enumerate(columns):
                if name in layers:
                    x = left + column * _CELL
                    _cell(canvas, scale, table, layers[name], kind, chosen, (x, y))
    label = max([_LEFT, *(10 + CHARACTER * len(name) for name in others)])
    for column, kind in enumerate(formats if others else ()):
        canvas.text(label + (column + 0.5) * 96, first_other + 10, kind, "middle", bold=True)
    for row, name in enumerate(others):
        y = first_other + 18 + row * _ROW
        canvas.text(label - 6, y + 13, name, "end")
        for column, kind in enumerate(formats):
            x = label + (column + 0.5) * 96 - _CELL / 2
            _cell(canvas, scale, table, name, kind, chosen, (x, y))
    return canvas


class _Scale:
    """Colours of the logarithms from `low` to `high`, both above 0."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = math.log10(low), math.log10(high)

    def colour(self, error: float) -> str:
        if error <= 0:
            return _RAMP[0]
        share = (math.log10(error) - self.low) / ((self.high - self.low) or 1)
        place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
        index = min(int(place), len(_RAMP) - 2)
        ends = [[int(c[at : at + 2], 16) for at in (1, 3, 5)] for c in _RAMP[index : index + 2]]
        mixed = [round(a + (b - a) * (place - index)) for a, b in zip(*ends, strict=True)]
        return "#" + "".join(f"{value:02X}" for value in mixed)


def _blocks(table: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """{block: {kind of layer: name of the unit}} of those that stand in a block."""
    found: dict[int, dict[str, str]] = {}
    for name in table:
        if match := _BLOCK.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = name
    return dict(sorted(found.items()))


def _cell(
    canvas: Canvas,
    scale: _Scale,
    table: Mapping[str, Mapping[str, Any]],
    unit: str,
    kind: str,
    chosen: Mapping[str, str],
    corner: tuple[float, float],
) -> None:
    one = table[unit].get(kind)
    if one is None:  # the format doesn't fit the layer
        return
    x, y = corner
    note = f"{unit} as {kind}: {one['error']:.1e}, {one['weight_bytes']} bytes"
    canvas.cell(x + 1, y + 1, _CELL - 2, _ROW - 2, scale.colour(one["error"]), note)
    if chosen.get(unit) == kind:
        left, top, right, bottom = x + 2, y + 2, x + _CELL - 2, y + _ROW - 2
        frame = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
        canvas.line(frame, _FRAME)


def _legend(canvas: Canvas, scale: _Scale) -> None:
    """Colours with the errors at both ends, and what a frame is."""
    left, top, width, parts = _LEFT + 50, 30, 200, 40
    for number in range(parts):
        share = (number + 0.5) / parts
        error = 10 ** (scale.low + share * (scale.high - scale.low))
        canvas.cell(left + number * width / parts, top, width / parts + 0.5, 12, scale.colour(error))
    canvas.text(left - 6, top + 10, f"{10**scale.low:.0e}", "end")
    canvas.text(left + width + 6, top + 10, f"{10**scale.high:.0e}  relative L2, log scale")
    x = left + width + 230
    frame = ((x, top), (x + 24, top), (x + 24, top + 12), (x, top + 12), (x, top))
    canvas.line(frame, _FRAME)
    canvas.text(x + 31, top + 10, "taken by the recipe")


def _described(table: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{unit}: " + ", ".join(f"{kind} {one['error']:.1e}" for kind, one in kinds.items())
        for unit, kinds in table.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture. Returns 0."""
    return write_plot(sensitivity_plot, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
