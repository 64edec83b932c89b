"""Draws what docs/tiny-model.md shows: film strips of held-out people, and the curves of the training.

    python -m proteus_deploy.benchmarks.tiny_model_pictures TINY_RUN VIDEOS --output-dir docs/images

TINY_RUN is the folder of `train --preset tiny`, VIDEOS the folder of videos that `tiny_model_quality` left in
its --work. Nothing is computed here but means: the videos are those that were measured, the curves those of
the logs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_deploy._files import atomic_file
from proteus_deploy.benchmarks import tiny_model_quality as quality
from proteus_deploy.evaluate.film_strip import StripRow, film_strip, frame_indices
from proteus_deploy.evaluate.plots import Line, line_plot
from proteus_deploy.training.avatars import HELD_OUT_SEEDS, MOTIONS, make_photo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FRAMES = 6
_POINTS = 24  # of a curve, each the mean of as many lines of the log as it takes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tiny_run", type=Path, metavar="TINY_RUN")
    parser.add_argument("videos", type=Path, metavar="VIDEOS")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--readme", type=int, nargs="+", default=[0, 1, 2], help="cases of the README's picture, from 0"
    )
    given = parser.parse_args(arguments)

    cases = quality.cases(HELD_OUT_SEEDS, quality.SEEDS)
    videos, out = given.videos, given.output_dir
    _write(out / "tiny-model.png", _strip([cases[index] for index in given.readme], videos, height=112))
    first_of_each = {case.drawn.motion: case for case in reversed(cases)}
    _write(out / "tiny-model-motions.png", _strip([first_of_each[name] for name in MOTIONS], videos))
    _write(out / "tiny-model-held-out.png", _everyone([case for case in cases if case.seed == 0], videos))
    _write(out / "tiny-model-vae.svg", _vae_curves(given.tiny_run / "work" / "vae").encode())
    log = given.tiny_run / "transformer" / "log.jsonl"
    _write(out / "tiny-model-transformer.svg", _curve("Transformer", log, "unweighted_loss").encode())
    return 0


def _strip(cases: Sequence[quality.Case], videos: Path, *, height: int = 96) -> bytes:
    """A row for each case: the photo, then frames of the video; above it the prompt."""
    import numpy as np

    rows = []
    for case in cases:
        frames = _video(case, videos)
        shown = [frames[index] for index in frame_indices(len(frames), _FRAMES)]
        rows.append(StripRow(case.drawn.prompt, np.stack([_photo(case, len(frames[0])), *shown])))
    return film_strip(rows, frames=1 + _FRAMES, height=height)


def _everyone(cases: Sequence[quality.Case], videos: Path) -> bytes:
    """Photo and middle frame of each case, five cases a row."""
    import numpy as np

    rows = []
    for start in range(0, len(cases), 5):
        tiles: list[NDArray[np.uint8]] = []
        for case in cases[start : start + 5]:
            frames = _video(case, videos)
            tiles += [_photo(case, len(frames[0])), frames[len(frames) // 2]]
        last = min(start + 5, len(cases)) - 1
        rows.append(StripRow(f"people {start} to {last}: photo, frame of the video", np.stack(tiles)))
    return film_strip(rows, frames=10, height=96)


def _video(case: quality.Case, videos: Path) -> NDArray[np.uint8]:
    import numpy as np

    frames: NDArray[np.uint8] = np.load(videos / f"{case.name}.npy")
    return frames


def _photo(case: quality.Case, size: int) -> NDArray[np.uint8]:
    return make_photo(case.person, 0, size).image


def _vae_curves(folder: Path) -> str:
    """Pictures and clips one after the other, over the processor minutes of both."""
    parts = [_lines(folder / f"{name}.log.jsonl") for name in ("vae_pictures", "vae")]
    before = parts[0][-1]["cpu_seconds"]
    x: list[float] = []
    series: list[list[float | None]] = [[], []]
    for number, lines in enumerate(parts):
        for time, error in _means(lines, "cpu_seconds", "absolute"):
            x.append((time + number * before) / 60)
            for place in (0, 1):
                series[place].append(error if place == number else None)
    drawn = [Line("pictures", tuple(series[0])), Line("clips", tuple(series[1]))]
    return line_plot(
        "VAE", x, drawn, x_label="processor minutes", y_label="absolute error of pixels, -1 to 1"
    )


def _curve(title: str, log: Path, value: str) -> str:
    points = _means(_lines(log), "step", value)
    line = Line(value, tuple(y for _, y in points))
    return line_plot(title, [x for x, _ in points], [line], x_label="step", y_label=value.replace("_", " "))


def _means(lines: Sequence[dict[str, float]], x: str, y: str) -> list[tuple[float, float]]:
    """Of consecutive lines, at most `_POINTS` of them; x is that of the last line of each."""
    each = -(-len(lines) // _POINTS)
    groups = [lines[start : start + each] for start in range(0, len(lines), each)]
    return [(group[-1][x], sum(line[y] for line in group) / len(group)) for group in groups]


def _lines(log: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, content: bytes) -> None:
    with atomic_file(file) as temporary:
        temporary.write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main())
